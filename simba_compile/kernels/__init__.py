"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops``, ``ops_ssd`` (Mamba-2) and ``ops_linear`` state every operator once (schema, shapes, gradient); ``reference`` defines
it in plain torch; ``native``, ``native_ssd`` and ``native_linear`` bind the C kernels under ``cpu/``; ``gpu`` has the
Triton kernels.
"""

from simba_compile.kernels import ops, ops_linear, ops_ssd

__all__ = ["ops", "ops_linear", "ops_ssd"]

"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops`` and ``ops_ssd`` (Mamba-2) state every operator once (schema, shapes, gradient); ``reference`` defines it in plain
torch; ``native`` and ``native_ssd`` bind the C kernels under ``cpu/``; ``gpu`` has the
Triton kernels.
"""

from simba_compile.kernels import ops, ops_ssd

__all__ = ["ops", "ops_ssd"]

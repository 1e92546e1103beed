"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops`` states every operator once; ``reference`` defines it in plain torch; ``native``, ``native_ssd`` (Mamba-2) and
``native_linear`` bind the C kernels under ``cpu/``; ``gpu`` has the Triton kernels.
"""

from simba_compile.kernels import ops

__all__ = ["ops"]

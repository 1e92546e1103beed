"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops`` states every operator once; ``reference`` defines it in plain torch; ``native``, ``native_ssd`` (Mamba-2),
``native_linear``, ``native_norm`` and ``native_mixer`` bind the C kernels under ``cpu/``; ``gpu`` has the Triton kernels.
"""

from simba_compile.kernels import ops

__all__ = ["ops"]

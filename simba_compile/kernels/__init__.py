"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops`` states every operator once; ``reference`` defines it in plain torch; ``native`` calls the C kernels of ``cpu``;
``gpu`` has the Triton kernels. The files of the first three are cut alike.
"""

from simba_compile.kernels import ops

__all__ = ["ops"]

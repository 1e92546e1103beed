"""The operators ``torch.ops.simba.*`` and what runs them on each device.

``ops`` states every operator once (schema, shapes, gradient); ``reference`` defines it in plain torch; ``native`` binds the
C kernels under ``cpu/``.
"""

from simba_compile.kernels import ops

__all__ = ["ops"]

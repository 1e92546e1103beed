"""The C kernels of ``cpu/``, in files as those of ``ops``: each checks what it is given, and calls C by ``binding``."""

"""The Triton kernels for CUDA and ROCm, one file for each operator: kernel, launcher, and how its configuration is chosen.

Each function here has the signature of the operator of its name. Importing this package needs triton; `ops` does so when a
tensor on a GPU first asks for it. float32, bfloat16 and float16 in and out, float32 inside; any strides.
"""

from simba_compile.kernels.gpu.conv import causal_conv1d, causal_conv1d_backward, conv_update
from simba_compile.kernels.gpu.gather import gather
from simba_compile.kernels.gpu.influence import influence
from simba_compile.kernels.gpu.norm import rms_norm
from simba_compile.kernels.gpu.select import select
from simba_compile.kernels.gpu.state import state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_backward",
    "conv_update",
    "gather",
    "influence",
    "rms_norm",
    "select",
    "state_update",
]

"""The operators ``torch.ops.simba.*``, each stated once: schema, shapes under fake tensors, gradient.

Each documented function is the operator of its name, and what the operator runs: the Triton kernel for tensors on a GPU,
the native kernel for tensors on the CPU where it was built, else `reference` (`dispatch`). Channels are last: ``x`` is
(batch, token, channel). Tensors may be float32, float64, bfloat16 or float16; halves are computed in float32. Any strides
are taken; the last axis is read without a copy where its stride is 1.

What does not fit raises `ValueError`, with what was given and what is expected, or, where `reference` runs, torch's errors.
"""

from simba_compile.kernels.ops import conv, linear, mixer, norm, scan, ssd, tokens

__all__ = ["conv", "linear", "mixer", "norm", "scan", "ssd", "tokens"]

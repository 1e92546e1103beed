"""Functions of one number that the kernels share, accurate to float32 with the GPU's exp2 and log2 alone."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp(x)): max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2 atanh(s) with s = e / (2 + e) ≤ 1/3.

    The series of atanh stops where its next term is below float32. A plain log(1 + e) would lose a small e.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.where(x > 0, x, 0.0) + 2.0 * s * series


@triton.jit
def step_size(dt, dt_bias, SOFTPLUS: tl.constexpr):
    """Δ in float32 from what is loaded for it; `dt_bias` is None, or broadcasts."""
    delta = dt.to(tl.float32)
    if dt_bias is not None:
        delta = delta + dt_bias
    if SOFTPLUS:
        delta = softplus(delta)
    return delta


@triton.jit
def clamp(delta, low, high):
    """Within limits, that Inductor passes as double; NaN stays NaN."""
    return tl.clamp(delta, tl.cast(low, tl.float32), tl.cast(high, tl.float32), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))

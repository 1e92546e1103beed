"""Functions of one number that the kernels share, accurate to float32 with the GPU's exp2 and log2 alone."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp(x)): max(x, 0) + log1p(e) with e = exp(-|x|) ≤ 1. A plain log(1 + e) would lose a small e.

    The polynomial is log1p(e) / e within 5e-9 of it, the minimax of its degree; in float32 the product is within 1.5e-7.
    Triton's log2 would take longer, and a division (2 atanh(e / (2 + e))) does.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    ratio = tl.fma(e, -0.003244024235755205, 0.019851457327604294)
    ratio = tl.fma(e, ratio, -0.056959524750709534)
    ratio = tl.fma(e, ratio, 0.10603654384613037)
    ratio = tl.fma(e, ratio, -0.15305592119693756)
    ratio = tl.fma(e, ratio, 0.1967593878507614)
    ratio = tl.fma(e, ratio, -0.24954134225845337)
    ratio = tl.fma(e, ratio, 0.3332996368408203)
    ratio = tl.fma(e, ratio, -0.4999990165233612)
    ratio = tl.fma(e, ratio, 1.0)
    return tl.fma(e, ratio, tl.maximum(x, 0.0))


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

"""The C kernels of the convolution, ``cpu/conv.h`` and ``cpu/decode.h``."""

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import (
    DTYPES,
    ROW,
    ROWS,
    as_constant,
    by_rows,
    call,
    expect,
    expect_on_cpu,
    pointer,
    view_of,
)
from simba_compile.kernels.reference import compute_dtype

MAX_WIDTH = 64  # cpu/level.h


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, axes: str) -> None:
    if x.dtype not in DTYPES or x.dim() != len(axes.split()) or weight.dim() != 2:
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and weight is {tuple(weight.shape)}; expected x ({axes.replace(' ', ', ')}) "
            "in float32, float64, bfloat16 or float16 and weight (channel, width)."
        )
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"weight has a width of {weight.shape[1]}; the native kernels take 1 to {MAX_WIDTH}.")
    expect_on_cpu("x", x)
    expect("weight", weight, (x.shape[-1], weight.shape[1]), None)
    expect("bias", bias, (x.shape[-1],), None)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.causal_conv1d`."""
    _check_conv(x, weight, bias, ROWS)
    x, kind = by_rows(x), compute_dtype(x.dtype)
    across, bias = weight.to(kind).t().contiguous(), as_constant(bias, kind)
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        words = [*x.shape, weight.shape[1], silu, *view_of(x), pointer(across), pointer(bias), *view_of(out)]
        call("causal_conv1d", x.dtype, words)
    return out


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias; the last one empty where there is no bias."""
    _check_conv(x, weight, bias, ROWS)
    expect("grad", grad, tuple(x.shape), x.dtype)
    x, grad, kind = by_rows(x), by_rows(grad), compute_dtype(x.dtype)
    across, fixed = weight.to(kind).t().contiguous(), as_constant(bias, kind)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight, dbias = torch.zeros_like(across), torch.zeros(0 if bias is None else x.shape[2], dtype=kind)
    if x.numel():
        words = [*x.shape, weight.shape[1], silu, *view_of(x), pointer(across), pointer(fixed), *view_of(grad)]
        words += [*view_of(dx), pointer(dweight), pointer(dbias) if bias is not None else 0]
        call("causal_conv1d_backward", x.dtype, words)
    return dx, dweight.t().contiguous(), dbias


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.conv_update`."""
    _check_conv(x, weight, bias, ROW)
    batch, channels = x.shape
    kind = compute_dtype(x.dtype)
    expect("state", state, (batch, channels, weight.shape[1]), None)
    window: Tensor = as_constant(state, x.dtype)  # type: ignore[assignment]
    x = by_rows(x)
    weight, bias = as_constant(weight, kind), as_constant(bias, kind)  # type: ignore[assignment]
    out = torch.empty(batch, channels, dtype=x.dtype)
    if x.numel():
        words = [batch, channels, weight.shape[1], silu, pointer(window), pointer(x), x.stride(0)]
        call("conv_update", x.dtype, [*words, pointer(weight), pointer(bias), pointer(out)])
    if window is not state:
        state.copy_(window)
    return out

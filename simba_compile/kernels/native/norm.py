"""The C kernels of the norms, ``cpu/norm.h``."""

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import (
    DTYPES,
    as_constant,
    bits,
    call,
    expect,
    expect_on_cpu,
    flat_rows,
    pointer,
    stream_of,
)
from simba_compile.kernels.reference import compute_dtype

MAX_GROUP = 1 << 16  # channels that the norm keeps on its stack


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `simba_compile.kernels.ops.norm.rms_norm`."""
    return gated_norm(x, None, weight, eps, 1)


def gated_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.norm.gated_norm`."""
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype}; expected (..., channel) in float32, float64, bfloat16 or float16."
        )
    expect_on_cpu("x", x)
    channels = x.shape[-1]
    expect("gate", gate, tuple(x.shape), None)
    expect("weight", weight, (channels,), None)
    if groups < 1 or channels % groups or channels // groups > MAX_GROUP:
        raise ValueError(f"groups is {groups}; expected a divisor of {channels} channels, with at most {MAX_GROUP} in each.")
    kind = compute_dtype(x.dtype)
    dtype = dtype or x.dtype
    full = gate is not None and gate.dtype in DTYPES and compute_dtype(gate.dtype) == x.dtype  # the gate is read as it is
    flat, gates = flat_rows(x), None if gate is None else flat_rows(gate if full else gate.to(x.dtype))
    elements = x.dtype if gates is None else gates.dtype
    weight = as_constant(weight, kind)
    out = torch.empty(x.shape, dtype=dtype if dtype in (elements, kind) else kind)
    if x.numel():
        words = [flat.shape[0], channels, bits(eps), pointer(flat), flat.stride(0), pointer(weight), pointer(out)]
        words += [pointer(gates), 0 if gates is None else gates.stride(0), channels // groups, full, out.dtype == kind]
        call("rms_norm", elements, words)
    return out.to(dtype)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.norm.add_norm`."""
    kind = compute_dtype(x.dtype)
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] > MAX_GROUP or residual.dtype not in (x.dtype, kind):
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and residual {residual.dtype}; expected x (..., channel) in float32, "
            f"float64, bfloat16 or float16 with at most {MAX_GROUP} channels, and a residual of that dtype, or in float32 "
            "beside halves."
        )
    channels = x.shape[-1]
    expect_on_cpu("x", x)
    expect("weight", weight, (channels,), None)
    stream, index, counts, strides = stream_of("residual", residual, index, x.shape, None)
    rows, weight = flat_rows(x), as_constant(weight, kind)
    total, out = torch.empty(x.shape, dtype=residual.dtype), torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        words = [rows.shape[0], *counts, channels, bits(eps), pointer(stream), *strides, pointer(index)]
        words += [pointer(rows), rows.stride(0), pointer(weight), pointer(total), pointer(out), residual.dtype == kind]
        call("add_norm", x.dtype, words)
    return total, out

"""The C kernels of the norms, ``cpu/norm.h``, called as `simba_compile.kernels.native` calls its own."""

import torch
from torch import Tensor

from simba_compile.kernels.native import DTYPES, _bits, _call, _constant, _expect, _expect_on_cpu, _flat, _pointer, _stream
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
    _expect_on_cpu("x", x)
    channels = x.shape[-1]
    _expect("gate", gate, tuple(x.shape), None)
    _expect("weight", weight, (channels,), None)
    if groups < 1 or channels % groups or channels // groups > MAX_GROUP:
        raise ValueError(f"groups is {groups}; expected a divisor of {channels} channels, with at most {MAX_GROUP} in each.")
    kind = compute_dtype(x.dtype)
    dtype = dtype or x.dtype
    full = gate is not None and gate.dtype in DTYPES and compute_dtype(gate.dtype) == x.dtype  # the gate is read as it is
    flat, gates = _flat(x), None if gate is None else _flat(gate if full else gate.to(x.dtype))
    elements = x.dtype if gates is None else gates.dtype
    weight = _constant(weight, kind)
    out = torch.empty(x.shape, dtype=dtype if dtype in (elements, kind) else kind)
    if x.numel():
        words = [flat.shape[0], channels, _bits(eps), _pointer(flat), flat.stride(0), _pointer(weight), _pointer(out)]
        words += [_pointer(gates), 0 if gates is None else gates.stride(0), channels // groups, full, out.dtype == kind]
        _call("rms_norm", elements, words)
    return out.to(dtype)


def add_norm(
    residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.norm.add_norm`."""
    kind = compute_dtype(x.dtype)
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] > MAX_GROUP or residual.dtype not in (x.dtype, kind):
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and residual {residual.dtype}; expected x (..., channel) in float32, "
            f"float64, bfloat16 or float16 with at most {MAX_GROUP} channels, and a residual of that dtype, or in float32 "
            "beside halves."
        )
    channels = x.shape[-1]
    _expect_on_cpu("x", x)
    _expect("weight", weight, (channels,), None)
    stream, index, counts, strides = _stream("residual", residual, index, x.shape, None)
    rows, weight = _flat(x), _constant(weight, kind)
    total, out = torch.empty(x.shape, dtype=residual.dtype), torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        words = [rows.shape[0], *counts, channels, _bits(eps), _pointer(stream), *strides, _pointer(index)]
        words += [_pointer(rows), rows.stride(0), _pointer(weight), _pointer(total), _pointer(out), residual.dtype == kind]
        _call("add_norm", x.dtype, words)
    return total, out

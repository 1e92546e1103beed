"""The RMS norms over the last axis: `simba_compile.kernels.ops.norm.rms_norm`, `gated_norm` and `add_norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import silu


@triton.jit
def _entries(x, gate, known):
    """x, or x silu(gate), in float32."""
    u = tl.load(x, mask=known, other=0.0).to(tl.float32)
    if gate is not None:
        u *= silu(tl.load(gate, mask=known, other=0.0).to(tl.float32))
    return u


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _rms_norm(
    x, x_outer, x_inner, x_entry, gate, gate_outer, gate_inner, gate_entry, weight, out, rows, inner_rows, size, groups, eps,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows at once, BLOCK_N entries at a time; a row is one group of x[r // inner_rows, r % inner_rows]."""
    r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    whole, before = r // groups, r % groups * size
    x += whole // inner_rows * x_outer + whole % inner_rows * x_inner + before * x_entry
    if gate is not None:
        gate += whole // inner_rows * gate_outer + whole % inner_rows * gate_inner + before * gate_entry
    squares = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        u = _entries(x + n * x_entry, None if gate is None else gate + n * gate_entry, (r < rows) & (n < size))
        squares += u * u
    scale = tl.rsqrt(tl.sum(squares, 1)[:, None] / size + tl.cast(eps, tl.float32))  # Inductor passes it as double
    for start in range(0, size, BLOCK_N):  # the second time from the cache
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        valid = (r < rows) & (n < size)
        y = _entries(x + n * x_entry, None if gate is None else gate + n * gate_entry, valid) * scale
        if weight is not None:
            y *= tl.load(weight + before + n, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + r * size + n, y, mask=valid)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `simba_compile.kernels.ops.norm.rms_norm`."""
    return _norm(x, None, weight, eps, 1, None)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.norm.gated_norm`."""
    runtime.expect(gate=(gate, tuple(x.shape)))
    return _norm(x, gate, weight, eps, groups, dtype)


def _norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None
) -> Tensor:
    runtime.expect(weight=(weight, (x.shape[-1],)))
    runtime.expect_groups(groups, channels=x.shape[-1])
    out = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        rows, gates = _rows(x), None if gate is None else _rows(gate)
        count, size = rows.shape[0] * rows.shape[1] * groups, rows.shape[2] // groups
        shape = _shape(size)
        runtime.launch(
            _rms_norm, (runtime.blocks_of(count, shape["BLOCK_R"]),),
            rows, *rows.stride(), gates, *((0, 0, 0) if gates is None else gates.stride()), runtime.flat(weight), out,
            count, rows.shape[1], size, groups, eps, **shape,
        )  # fmt: skip
    return out


@triton.jit
def _sums(residual, is_there, x, known):
    """residual + x, in float32."""
    return tl.load(residual, mask=is_there, other=0.0).to(tl.float32) + tl.load(x, mask=known, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _add_norm(
    residual, residual_outer, residual_inner, residual_entry, index, index_batch, index_kept, x, x_outer, x_inner, x_entry,
    weight, total, out, rows, inner_rows, tokens, size, eps,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows at once, BLOCK_N entries at a time: total = residual + x, and the norm of it as rounded to out's type."""
    r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    outer, t = r // inner_rows, r % inner_rows
    x += outer * x_outer + t * x_inner
    if index is not None:
        t = tl.load(index + outer * index_batch + t * index_kept, mask=r < rows, other=0)
    is_token = (r < rows) & (t >= 0) & (t < tokens)
    residual += outer * residual_outer + t * residual_inner
    squares = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        known = (r < rows) & (n < size)
        y = _sums(residual + n * residual_entry, is_token & (n < size), x + n * x_entry, known)
        tl.store(total + r * size + n, y, mask=known)
        y = y.to(out.dtype.element_ty).to(tl.float32)
        squares += y * y
    scale = tl.rsqrt(tl.sum(squares, 1)[:, None] / size + tl.cast(eps, tl.float32))  # Inductor passes it as double
    for start in range(0, size, BLOCK_N):  # the second time from the cache
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        known = (r < rows) & (n < size)
        y = _sums(residual + n * residual_entry, is_token & (n < size), x + n * x_entry, known)
        y = y.to(out.dtype.element_ty).to(tl.float32) * scale
        if weight is not None:
            y *= tl.load(weight + n, mask=n < size, other=0.0).to(tl.float32)
        tl.store(out + r * size + n, y, mask=known)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.norm.add_norm`. A position outside the residual counts as zeros."""
    runtime.expect(weight=(weight, (x.shape[-1],)))
    if index is None:
        runtime.expect(residual=(residual, tuple(x.shape)))
    else:
        runtime.expect(index=(index, tuple(x.shape[:2])), residual=(residual, (x.shape[0], residual.shape[1], x.shape[2])))
    total, out = x.new_empty(x.shape, dtype=residual.dtype), x.new_empty(x.shape)
    if x.numel():
        stream, rows = _rows(residual), _rows(x)
        count, size = rows.shape[0] * rows.shape[1], rows.shape[2]
        shape = _shape(size)
        runtime.launch(
            _add_norm, (runtime.blocks_of(count, shape["BLOCK_R"]),),
            stream, *stream.stride(), index, *((0, 0) if index is None else index.stride()), rows, *rows.stride(),
            runtime.flat(weight), total, out, count, rows.shape[1], stream.shape[1], size, eps, **shape,
        )  # fmt: skip
    return total, out


def _shape(size: int) -> dict[str, int]:
    """A long row is one program's; of short ones (FalconMamba norms 16 numbers) it takes as many as make 1024 entries."""
    block = min(runtime.power_of_two(size), 4096)
    return {"BLOCK_R": max(1, 1024 // block), "BLOCK_N": block, "num_warps": max(4, block // 512)}


def _rows(x: Tensor) -> Tensor:
    """x with three axes, the last of which is the one that is normed."""
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])

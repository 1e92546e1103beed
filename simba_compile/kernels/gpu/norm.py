"""The RMS norm over the last axis (`simba_compile.kernels.ops.rms_norm`)."""

import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime


@triton.jit
def _rms_norm(
    x, x_outer, x_inner, x_entry, weight, out, rows, inner, size, eps, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """BLOCK_R rows at once, BLOCK_N entries at a time; row r is x[r // inner, r % inner]."""
    r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    row = x + r // inner * x_outer + r % inner * x_inner
    squares = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        u = tl.load(row + n * x_entry, mask=(r < rows) & (n < size), other=0.0).to(tl.float32)
        squares += u * u
    scale = tl.rsqrt(tl.sum(squares, 1)[:, None] / size + eps)
    for start in range(0, size, BLOCK_N):  # the second time from the cache
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        valid = (r < rows) & (n < size)
        y = tl.load(row + n * x_entry, mask=valid, other=0.0).to(tl.float32) * scale
        if weight is not None:
            y *= tl.load(weight + n, mask=n < size, other=0.0).to(tl.float32)
        tl.store(out + r * size + n, y, mask=valid)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `simba_compile.kernels.ops.rms_norm`."""
    runtime.expect(weight=(weight, (x.shape[-1],)))
    out = x.new_empty(x.shape)
    if x.numel():
        rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        count, size = rows.shape[0] * rows.shape[1], rows.shape[2]
        # A long row is one program's; of short ones (FalconMamba norms 16 numbers) it takes as many as make 1024 entries.
        block = min(runtime.power_of_two(size), 4096)
        group = max(1, 1024 // block)
        runtime.launch(
            _rms_norm, (runtime.blocks_of(count, group),), rows, *rows.stride(), runtime.flat(weight), out,
            count, rows.shape[1], size, eps, BLOCK_R=group, BLOCK_N=block, num_warps=max(4, block // 512),
        )  # fmt: skip
    return out

"""The tokens of every sequence at given positions (`simba_compile.kernels.ops.tokens.gather`): a copy, of any dtype."""

import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.gpu import runtime


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _gather(
    x, x_batch, x_token, x_entry, index, index_batch, index_kept, out, tokens, kept, size, blocks,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[b, i] = x[b, index[b, i]], for BLOCK_K positions and BLOCK_R entries of their rows."""
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    groups = tl.cdiv(kept, BLOCK_K)
    batch = (rest // groups).to(tl.int64)
    i = (rest % groups * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    r = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    t = tl.load(index + batch * index_batch + i * index_kept, mask=i < kept, other=0)
    valid = (i < kept)[:, None] & (r < size)[None, :]
    known = valid & ((t >= 0) & (t < tokens))[:, None]
    value = tl.load(x + batch * x_batch + t[:, None] * x_token + r[None, :] * x_entry, mask=known, other=0)
    tl.store(out + (batch * kept + i[:, None]) * size + r[None, :], value, mask=valid)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.gather`. Tokens in axis 1; plain torch takes them along any other.

    A position outside the sequence gives zeros: reading it back to raise an error would wait for the GPU.
    """
    if dim != 1 or x.dim() > 3 or x.is_complex() or x.numel() == 0 or index.numel() == 0:
        return reference.gather(x, index, dim)
    if x.shape[0] not in (1, index.shape[0]):
        raise ValueError(f"x has {x.shape[0]} sequences and index {index.shape[0]}; expected as many, or one in x for all.")
    rows = x[:, :, None] if x.dim() == 2 else x
    (batch, kept), size = index.shape, rows.shape[2]
    out = x.new_empty((batch, kept, *x.shape[2:]))
    strides = (0 if x.shape[0] == 1 else rows.stride(0), rows.stride(1), rows.stride(2))
    # About 2048 entries for each program: whole rows where they are short, a piece of one row where they are long.
    block = min(runtime.power_of_two(size), 1024)
    group = 2048 // block
    blocks = runtime.blocks_of(size, block)
    runtime.launch(
        _gather, (batch * runtime.blocks_of(kept, group) * blocks,),
        rows, *strides, index, *index.stride(), out, x.shape[1], kept, size, blocks,
        BLOCK_K=group, BLOCK_R=block, num_warps=4,
    )  # fmt: skip
    return out

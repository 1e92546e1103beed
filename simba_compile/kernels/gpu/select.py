"""The k best tokens of every sequence, in their order (`simba_compile.kernels.ops.tokens.select`).

A radix search: each pass over a sequence fixes eight bits of its k-th largest score, until all that share them stay (on
the scores of models three or four passes, eight at most); a last pass writes the positions. One program does a whole
sequence: one launch, and nothing waits for the host. Scores of a sequence (8 bytes a token) stay in the second-level
cache between the passes. `torch.topk` does not promise which of equal scores it takes, and a sort by score, then another
back into order, is some twenty launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime

ALWAYS = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # ranks above every score
NOT_A_NUMBER = tl.constexpr(0x7FFFFFFFFFFFFFFE)
SMALL, LARGE, TOKENS_OF_A_WARP = 1024, 4096, 256  # tokens of a block
TOP_BYTE = tl.constexpr(-(1 << 56))
TOP_BIT = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(scores, t, tokens, first, last):
    """Scores as integers without a sign in their order; NaN above all numbers, the protected ends above NaN."""
    valid = t < tokens
    score = tl.load(scores + t, mask=valid, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int64, bitcast=True)  # one zero, not two
    key = bits ^ ((bits >> 63) & ALWAYS)
    key = tl.where(score != score, NOT_A_NUMBER, key)
    return tl.where(valid & ((t < first) | (t >= tokens - last)), ALWAYS, key) ^ TOP_BIT


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _select(scores, index, tokens, k, first, last, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * tokens
    index += row * k
    digits = tl.arange(0, 256)

    # `prefix`: the bits of the k-th largest key that are known, those below 0; `known`: which they are; `equal`: how many
    # keys have them; `wanted`: how many of these stay. Once all of them do, the other bits need not be known.
    prefix, known, wanted, equal = tl.zeros([], tl.int64), tl.zeros([], tl.int64), k, tokens
    shift = 56
    while (shift >= 0) & (equal > wanted):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, tokens, BLOCK):
            t = start + tl.arange(0, BLOCK)
            key = _keys(scores, t, tokens, first, last)
            digit = ((key >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=(t < tokens) & ((key & known) == prefix))
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1  # the largest digit with `wanted` keys from it on
        equal = tl.sum(tl.where(digits == digit, counts, 0), 0)
        wanted -= tl.sum(tl.where(digits == digit, at_least, 0), 0) - equal
        prefix |= digit.to(tl.int64) << shift
        known = (known >> 8) | TOP_BYTE  # the sign comes along
        shift -= 8

    # Of the `equal` keys the last `wanted` stay.
    written, passed = 0, wanted - equal
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        key = _keys(scores, t, tokens, first, last) & known
        tie = ((t < tokens) & (key == prefix)).to(tl.int32)
        late = passed + tl.cumsum(tie, 0) > 0
        above = (key ^ TOP_BIT) > (prefix ^ TOP_BIT)
        keep = ((t < tokens) & (above | ((tie == 1) & late))).to(tl.int32)
        at = written + tl.cumsum(keep, 0) - 1
        tl.store(index + at, t.to(tl.int64), mask=keep == 1)
        written += tl.sum(keep, 0)
        passed += tl.sum(tie, 0)


def select(scores: Tensor, k: int, first: int, last: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.select`."""
    batch, tokens = scores.shape
    index = scores.new_empty((batch, k), dtype=torch.int64)
    if index.numel():
        # Large blocks, for a program has a sequence to itself; no larger than what 16 warps keep in registers, nor than a
        # sequence. While a graph of all lengths is traced, no length is asked for: that would make it one of some.
        block = SMALL if isinstance(tokens, int) and tokens <= SMALL else LARGE
        scores = scores.to(torch.float64).contiguous()
        runtime.launch(
            _select, (batch,), scores, index, tokens, k, first, last, BLOCK=block, num_warps=block // TOKENS_OF_A_WARP
        )
    return index

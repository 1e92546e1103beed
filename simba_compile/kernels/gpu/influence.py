"""The influence of each token on the last output, in the log domain (`simba_compile.kernels.ops.scan.influence`).

``log |Δy_T(t)[d]| = m + log|x_t Δ_t Σ_n C_T B_t exp(A S_t − m)|`` needs S_t, a sum over all later tokens. Three kernels
make it parallel over tokens:

1. `_chunk_sums` adds up the steps of each chunk of tokens,
2. `_suffix_sums` turns them into sums over all later chunks,
3. `_chunk_scores` walks each chunk from its end, with S going on from there.

Between chunks S is in double; within one, where it grows by a few steps, in float32. Each block of channels writes its own
part of the pool, so that no atomics are needed and the result is the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LN2, LOG2E, clamp, step_size

CHUNK = 64  # tokens: long enough that its double sums (8 bytes for a channel) are little beside its dt
UNDERFLOW = tl.constexpr(-126.0)  # the exponent below which a power of two is 0 in float32, subnormals aside


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _chunk_sums(
    dt, dt_batch, dt_token, dt_channel, dt_bias, sums,
    tokens, channels, chunks, blocks, low, high,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[b, j, c]: the steps of the tokens after each token of chunk j."""
    program = tl.program_id(0)
    block, chunk, batch = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < channels
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, CHUNK, BLOCK_T):
        t = (chunk * CHUNK + start + 1 + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = (t < tokens)[:, None] & inside[None, :]
        raw = tl.load(dt + batch * dt_batch + t[:, None] * dt_token + c[None, :] * dt_channel, mask=valid, other=0.0)
        step = step_size(raw, bias, SOFTPLUS)
        if CLAMP:
            step = clamp(step, low, high)
        total += tl.sum(tl.where(valid, step, 0.0).to(tl.float64), 0)
    tl.store(sums + (batch * chunks + chunk) * channels + c, total, mask=inside)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _suffix_sums(sums, channels, chunks, blocks, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums[b, j, c]: the sum over chunks j and later, in place."""
    program = tl.program_id(0)
    block, batch = program % blocks, (program // blocks).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    carry = tl.zeros([BLOCK_C], tl.float64)
    rounds = tl.cdiv(chunks, BLOCK_J)
    for i in range(rounds):
        j = (rounds - 1 - i) * BLOCK_J + tl.arange(0, BLOCK_J)
        valid = (j < chunks)[:, None] & (c < channels)[None, :]
        at = sums + (batch * chunks + j[:, None]) * channels + c[None, :]
        part = tl.load(at, mask=valid, other=0.0)
        tl.store(at, carry[None, :] + tl.cumsum(part, 0, reverse=True), mask=valid)
        carry += tl.sum(part, 0)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _chunk_scores(
    x, x_batch, x_token, x_channel, dt, dt_batch, dt_token, dt_channel, A, A_channel, A_state,
    B, B_batch, B_token, B_state, C, C_batch, C_state, dt_bias, later, partial,
    tokens, channels, states, chunks, blocks,
    POOL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS_IN_DECAY: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[b, block, t]: the pool over one block of channels, for the tokens of one chunk."""
    program = tl.program_id(0)
    block, chunk, batch = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < channels
    x += batch * x_batch + c[None, :] * x_channel
    dt += batch * dt_batch + c[None, :] * dt_channel
    A += c * A_channel
    B += batch * B_batch
    C += batch * C_batch
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]

    high, low = tl.full([BLOCK_C], -float("inf"), tl.float32), tl.full([BLOCK_C], float("inf"), tl.float32)
    for n in range(states):
        a = tl.load(A + n * A_state, mask=inside, other=0.0).to(tl.float32)
        high = tl.maximum(high, a, propagate_nan=tl.PropagateNan.ALL)
        low = tl.minimum(low, a, propagate_nan=tl.PropagateNan.ALL)

    # S at the end of the chunk, its smallest here where steps are positive: states that have faded there are left out.
    after = later + (batch * chunks + chunk + 1) * channels + c
    carry = tl.load(after, mask=c < tl.where(chunk + 1 < chunks, channels, 0), other=0.0)
    live = states
    if SOFTPLUS:
        live = 0
        for n in range(states):
            a = tl.load(A + n * A_state, mask=inside, other=0.0).to(tl.float32)
            exponent = (a - high) * LOG2E * carry.to(tl.float32)
            faded = tl.max(tl.where(inside, exponent, -float("inf")), 0) < UNDERFLOW
            live = tl.where(faded, live, n + 1)

    for i in range(CHUNK // BLOCK_T):
        t = (chunk * CHUNK + CHUNK - (i + 1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        here = t < tokens
        valid = here[:, None] & inside[None, :]
        follows = (t + 1 < tokens)[:, None] & inside[None, :]
        decay = tl.load(dt + (t + 1)[:, None] * dt_token, mask=follows, other=0.0)
        decay = tl.where(follows, step_size(decay, bias if BIAS_IN_DECAY else None, SOFTPLUS), 0.0)
        local = tl.cumsum(decay, 0, reverse=True)
        S = carry.to(tl.float32)[None, :] + local

        # m = lead S, the largest of the exponents A S; `base` is the block's largest before the tile's own steps.
        if SOFTPLUS:
            lead = high[None, :]
            ahead = high.to(tl.float64) * carry
            base = tl.max(tl.where(inside, ahead, -float("inf")), 0)
            shift = (ahead - base).to(tl.float32)[None, :] + high[None, :] * local
        else:  # S may be negative, and change its sign
            lead = tl.where(S < 0, low[None, :], high[None, :])
            ahead = lead.to(tl.float64) * (carry[None, :] + local.to(tl.float64))
            base = tl.max(tl.max(tl.where(valid, ahead, -float("inf")), 1), 0)
            shift = (ahead - base).to(tl.float32)

        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        S *= LOG2E
        for n in range(live):
            a = tl.load(A + n * A_state, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(B + t * B_token + n * B_state, mask=here, other=0.0).to(tl.float32)
            w *= tl.load(C + n * C_state).to(tl.float32)
            total += w[:, None] * tl.exp2((a[None, :] - lead) * S)
        if live < states:  # what was left out is 0, unless it was a bad number
            lost = tl.zeros([BLOCK_T], tl.float32)
            for start in range(0, states, BLOCK_N):
                m = start + tl.arange(0, BLOCK_N)
                known = here[:, None] & (m < states)[None, :]
                b = tl.load(B + t[:, None] * B_token + m[None, :] * B_state, mask=known, other=0.0).to(tl.float32)
                b *= tl.load(C + m * C_state, mask=m < states, other=0.0).to(tl.float32)[None, :]
                lost += tl.sum(b * 0.0, 1)
            total += lost[:, None]

        # Loaded only now: held through the loop over states they would take registers from it.
        delta = step_size(tl.load(dt + t[:, None] * dt_token, mask=valid, other=0.0), bias, SOFTPLUS)
        value = tl.load(x + t[:, None] * x_token, mask=valid, other=0.0).to(tl.float32) * delta * total
        if POOL == "max":
            value = tl.where(value < 0, 0.0, value)
        score = tl.where(inside[None, :], shift + tl.log2(tl.abs(value)) * LN2, -float("inf"))
        # Compared as integers in the order of the floats, with NaN as the largest; the bits of 0x7fffffff are a NaN again.
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        best = tl.max(bits, 1)
        best = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        if POOL == "l2":
            origin = tl.where(tl.abs(best) == float("inf"), 0.0, best)
            best = origin + 0.5 * LN2 * tl.log2(tl.sum(tl.exp2((score - origin[:, None]) * (2 * LOG2E)), 1))
        tl.store(partial + (batch * blocks + block) * tokens + t, base + best.to(tl.float64), mask=here)
        carry += tl.sum(decay.to(tl.float64), 0)


def suffix_sums(dt: Tensor, dt_bias: Tensor | None, softplus: bool, limits: tuple[float, float] | None = None) -> Tensor:
    """The steps of all tokens after the first one of each chunk, and of later chunks: (batch, chunk, channel), float64.

    `limits` are what the steps are clamped to.
    """
    batch, tokens, channels = dt.shape
    chunks = runtime.blocks_of(tokens, CHUNK)
    sums = dt.new_empty((batch, chunks, channels), dtype=torch.float64)
    block = 128
    blocks = runtime.blocks_of(channels, block)
    low, high = limits or (0.0, 0.0)
    runtime.launch(
        _chunk_sums, (batch * chunks * blocks,), dt, *dt.stride(), runtime.flat(dt_bias), sums,
        tokens, channels, chunks, blocks, low, high,
        SOFTPLUS=softplus, CLAMP=limits is not None, CHUNK=CHUNK, BLOCK_T=8, BLOCK_C=block, num_warps=1,
    )  # fmt: skip
    block = 32
    blocks = runtime.blocks_of(channels, block)
    runtime.launch(_suffix_sums, (batch * blocks,), sums, channels, chunks, blocks, BLOCK_J=32, BLOCK_C=block, num_warps=4)
    return sums


def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    pool: str,
    bias_in_decay: bool,
) -> Tensor:
    """See `simba_compile.kernels.ops.scan.influence`."""
    (batch, tokens, channels), states = x.shape, A.shape[1]
    runtime.expect(
        dt=(dt, (batch, tokens, channels)), A=(A, (channels, states)), B=(B, (batch, tokens, states)),
        C=(C, (batch, tokens, states)), dt_bias=(dt_bias, (channels,)),
    )  # fmt: skip
    if x.numel() == 0:
        return x.new_full((batch, tokens), -torch.inf, dtype=torch.float64)
    later = suffix_sums(dt, dt_bias if bias_in_decay else None, softplus)
    # One warp for 4 tokens of 128 channels: 16 pairs for each thread hide the latency of its exponentials; with 32,
    # registers spill. Few tokens in a tile keep the sums along them within a thread, or two.
    block = 128
    blocks = runtime.blocks_of(channels, block)
    partial = x.new_empty((batch, blocks, tokens), dtype=torch.float64)
    chunks, last = later.shape[1], C[:, -1]
    runtime.launch(
        _chunk_scores, (batch * chunks * blocks,),
        x, *x.stride(), dt, *dt.stride(), A, *A.stride(), B, *B.stride(), last, *last.stride(),
        runtime.flat(dt_bias), later, partial,         tokens, channels, states, chunks, blocks,
        POOL=pool, SOFTPLUS=softplus, BIAS_IN_DECAY=bias_in_decay,
        CHUNK=CHUNK, BLOCK_T=4, BLOCK_C=block, BLOCK_N=16, num_warps=1,
    )  # fmt: skip
    if blocks == 1:
        return partial[:, 0]
    return torch.logsumexp(2 * partial, 1) / 2 if pool == "l2" else partial.amax(1)

"""The influence of each token on the last output, in the log domain (`simba_compile.kernels.ops.scan.influence`).

``log |Δy_T(t)[d]| = m + log|x_t Δ_t Σ_n C_T B_t exp(A S_t − m)|`` needs S_t, a sum over all later tokens. Three kernels
make it parallel over tokens:

1. `_chunk_sums` adds up the steps of each chunk of tokens,
2. `_suffix_sums` turns them into sums over all later chunks,
3. `_chunk_scores` walks each chunk from its end, with S going on from there.

Between chunks S is in double; within one, where it grows by a few steps, in float32. Each block of channels writes its own
part of the pool, so that no atomics are needed and the result is the same in every run.

A program of `_chunk_scores` is one warp. Each lane has four neighbouring channels and takes four tokens together: sums along
tokens stay in its registers, and A, which is laid out along the channels, comes four numbers at a time. Where a GPU would
have few warps, chunks are shorter: a warp walks its own from one group to the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LN2, LOG2E, clamp, step_size

CHUNK = 64  # tokens: long enough that its double sums (8 bytes for a channel) are little beside its dt
SHORT = 16  # the shortest chunk: what a program does once, for all of its tokens, takes about as long as two groups of them
GROUP = 4  # tokens that a lane takes together
UNDERFLOW = tl.constexpr(-126.0)  # the exponent below which a power of two is 0 in float32, subnormals aside
SAFE = tl.constexpr(2.0**-60)  # what is far above all that underflows beside it


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _chunk_sums(
    dt, dt_batch, dt_token, dt_channel, dt_bias, sums,
    tokens, channels, chunk, chunks, blocks, low, high,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[b, j, c]: the steps of the tokens after each token of chunk j, which has `chunk` of them."""
    program = tl.program_id(0)
    block, place, batch = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < channels
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, chunk, BLOCK_T):
        t = (place * chunk + start + 1 + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = (t < tokens)[:, None] & inside[None, :]
        raw = dt + batch * dt_batch + t[:, None] * dt_token + c[None, :] * dt_channel
        raw = tl.load(raw, mask=valid, other=-float("inf"))  # whose softplus is no step
        step = step_size(raw, bias, SOFTPLUS)
        if CLAMP:
            step = clamp(step, low, high)
        if CLAMP or not SOFTPLUS:
            step = tl.where(valid, step, 0.0)
        total += tl.sum(step.to(tl.float64), 0)
    tl.store(sums + (batch * chunks + place) * channels + c, total, mask=inside)


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


@triton.jit
def _larger(a, b):
    """The larger one; NaN is larger than any number."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log_of_pool(plain, best, POOL: tl.constexpr):
    """The logarithm to base 2 of the pool over channels of ``plain``, the largest of which is `best`."""
    log = tl.log2(best)
    if POOL == "l2":
        share = plain * (1.0 / best)
        log += 0.5 * tl.log2(tl.sum(share * share, 0))
    return log


@triton.jit
def _pool_of_logs(size, shift, inside, POOL: tl.constexpr):
    """The same of ``size 2^shift`` where these underflow or are no numbers: it takes a logarithm for each channel."""
    logs = tl.where(inside, shift + tl.log2(size), -float("inf"))
    log = tl.reduce(logs, 0, _larger)
    if POOL == "l2":
        origin = tl.where(tl.abs(log) == float("inf"), 0.0, log)
        log = origin + 0.5 * tl.log2(tl.sum(tl.exp2((logs - origin) * 2), 0))
    return log


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _chunk_scores(
    x, x_batch, x_token, x_channel, dt, dt_batch, dt_token, dt_channel, A,
    B, B_batch, B_token, B_state, C, C_batch, C_state, dt_bias, later, partial,
    tokens, channels, states, chunk, chunks, blocks,
    POOL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS_IN_DECAY: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[b, block, t]: the pool over one block of channels, for the tokens of one chunk, which has `chunk` of them."""
    program = tl.program_id(0)
    block, place, batch = program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    x += batch * x_batch + c.to(tl.int64) * x_channel
    dt += batch * dt_batch + c.to(tl.int64) * dt_channel
    A += c
    B += batch * B_batch
    C += batch * C_batch
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)
    decay_bias = bias if BIAS_IN_DECAY else None

    high, low = tl.full([BLOCK_C], -float("inf"), tl.float32), tl.full([BLOCK_C], float("inf"), tl.float32)
    for n in range(states):
        a = tl.load(A + n * channels, mask=inside, other=0.0).to(tl.float32)
        high, low = _larger(high, a), tl.minimum(low, a, propagate_nan=tl.PropagateNan.ALL)

    # S at the chunk's last token, its smallest here where steps are positive: states that have faded there are left out.
    follows = c < tl.where(place + 1 < chunks, channels, 0)
    next_row = ((place + 1) * chunk).to(tl.int64)  # of the next chunk, whose first step `later` does not count
    first_step = step_size(tl.load(dt + next_row * dt_token, mask=follows, other=0.0), decay_bias, SOFTPLUS)
    carry = tl.load(later + (batch * chunks + place + 1) * channels + c, mask=follows, other=0.0)
    carry += tl.where(follows, first_step, 0.0).to(tl.float64)
    live = states
    if SOFTPLUS:
        lives = tl.zeros([BLOCK_C], tl.int32)  # of each channel; an exponent that is no number has not faded
        for n in range(states):
            a = tl.load(A + n * channels, mask=inside, other=0.0).to(tl.float32)
            faded = (a - high) * LOG2E * carry.to(tl.float32) < UNDERFLOW
            lives = tl.where(inside & ~faded, n + 1, lives)
        live = tl.max(lives, 0)
        # A bad number shows, whatever its state: a chunk with one goes through all of them.
        lost = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for part in range(0, chunk, BLOCK_T):
            t = (place * chunk + part + tl.arange(0, BLOCK_T)).to(tl.int64)
            for start in range(0, states, BLOCK_N):
                m = start + tl.arange(0, BLOCK_N)
                known = (t < tokens)[:, None] & (m < states)[None, :]
                b = tl.load(B + t[:, None] * B_token + m[None, :] * B_state, mask=known, other=0.0).to(tl.float32)
                lost += b * tl.load(C + m * C_state, mask=m < states, other=0.0).to(tl.float32)[None, :] * 0.0
        live = tl.where(tl.sum(tl.sum(lost, 1), 0) == 0.0, live, states)

    for i in range(chunk // GROUP):
        first = place * chunk + chunk - (i + 1) * GROUP
        # For each token of the group: where its rows are (past the end, at the last token), its step, S log2(e), and a lead:
        # m = lead S is the largest of the exponents A S. `base` is the largest m of the block, at the group's end or in it.
        rows, decays, S, leads, totals = (), (), (), (), ()
        base, local = tl.full([], -float("inf"), tl.float64), tl.zeros([BLOCK_C], tl.float32)
        if SOFTPLUS:
            base = tl.max(tl.where(inside, high.to(tl.float64) * carry, -float("inf")), 0)
        for j in tl.static_range(GROUP - 1, -1, -1):
            row = tl.minimum(first + j, tokens - 1).to(tl.int64)
            here = c < tl.where(first + j < tokens, channels, 0)
            decay = step_size(tl.load(dt + row * dt_token, mask=here, other=-float("inf")), decay_bias, SOFTPLUS)
            after = carry.to(tl.float32) + local
            lead = high
            if not SOFTPLUS:  # S may be negative, and change its sign
                lead = tl.where(after < 0, low, high)
                ahead = lead.to(tl.float64) * (carry + local.to(tl.float64))
                base = _larger(base, tl.max(tl.where(here, ahead, -float("inf")), 0))
                decay = tl.where(here, decay, 0.0)
            rows, decays, S, leads = (row,) + rows, (decay,) + decays, (after * LOG2E,) + S, (lead,) + leads
            totals = totals + (tl.zeros([BLOCK_C], tl.float32),)
            local += decay

        for n in tl.range(0, live, loop_unroll_factor=2):
            a = tl.load(A + n * channels, mask=inside, other=0.0).to(tl.float32)
            c_n = tl.load(C + n * C_state).to(tl.float32)
            sums = ()
            for j in tl.static_range(GROUP):
                w = tl.load(B + rows[j] * B_token + n * B_state).to(tl.float32) * c_n
                sums = sums + (tl.fma(w, tl.exp2((a - leads[j]) * S[j]), totals[j]),)
            totals = sums

        # |value| 2^shift of each token, and its largest: where those are numbers far from underflow one logarithm is enough.
        us, sizes, shifts, plains, bests = (), (), (), (), ()
        # Loaded only now: held through the loop over states they would take registers from it. All at once, to wait once.
        for j in tl.static_range(GROUP):
            us = us + (tl.load(x + rows[j] * x_token, mask=inside, other=0.0),)
        local = tl.zeros([BLOCK_C], tl.float32)
        offset = tl.where(inside, (high.to(tl.float64) * carry - base).to(tl.float32) * LOG2E, -float("inf"))
        for j in tl.static_range(GROUP - 1, -1, -1):
            delta = decays[j]
            if bias is not None and not BIAS_IN_DECAY:
                delta = step_size(tl.load(dt + rows[j] * dt_token, mask=inside, other=0.0), bias, SOFTPLUS)
            value = us[j].to(tl.float32) * delta * totals[j]
            if POOL == "max":
                value = _larger(value, 0.0)
            shift = tl.fma(high * LOG2E, local, offset)
            if not SOFTPLUS:
                shift = (leads[j].to(tl.float64) * (carry + local.to(tl.float64)) - base).to(tl.float32) * LOG2E
            plain = tl.abs(value) * tl.exp2(shift)
            best = tl.reduce(plain, 0, _larger)
            sizes, shifts, plains, bests = (tl.abs(value),) + sizes, (shift,) + shifts, (plain,) + plains, (best,) + bests
            local += decays[j]
        least, most = bests[GROUP - 1], bests[GROUP - 1]
        for j in tl.static_range(GROUP - 1):
            least = tl.minimum(least, bests[j], propagate_nan=tl.PropagateNan.ALL)
            most = _larger(most, bests[j])
        logs = bests
        if (least >= SAFE) & (most < float("inf")):
            logs = ()
            for j in tl.static_range(GROUP):
                logs = logs + (_log_of_pool(plains[j], bests[j], POOL),)
        else:
            logs = ()
            for j in tl.static_range(GROUP):
                logs = logs + (_pool_of_logs(sizes[j], shifts[j], inside, POOL),)
        to = partial + (batch * blocks + block) * tokens + first
        for j in tl.static_range(GROUP):
            tl.store(to + j, base + (logs[j] * LN2).to(tl.float64), mask=first + j < tokens)
        carry += local.to(tl.float64)


def suffix_sums(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, chunk: int, limits: tuple[float, float] | None = None
) -> Tensor:
    """The steps of all tokens after the first one of each chunk, and of later chunks: (batch · chunk, channel), float64.

    A chunk has `chunk` tokens, a multiple of 8; `limits` are what the steps are clamped to.
    """
    batch, tokens, channels = dt.shape
    chunks = runtime.blocks_of(tokens, chunk)
    sums = dt.new_empty((batch * chunks, channels), dtype=torch.float64)
    block = 128
    blocks = runtime.blocks_of(channels, block)
    low, high = limits or (0.0, 0.0)
    runtime.launch(
        _chunk_sums, (batch * chunks * blocks,), dt, *dt.stride(), runtime.flat(dt_bias), sums,
        tokens, channels, chunk, chunks, blocks, low, high,
        SOFTPLUS=softplus, CLAMP=limits is not None, BLOCK_T=8, BLOCK_C=block, num_warps=1,
    )  # fmt: skip
    block = 32
    blocks = runtime.blocks_of(channels, block)
    runtime.launch(_suffix_sums, (batch * blocks,), sums, channels, chunks, blocks, BLOCK_J=32, BLOCK_C=block, num_warps=4)
    return sums


def chunk_of(warps: int, tokens: int, device: torch.device) -> int:
    """The tokens of a chunk: `CHUNK`, or fewer where the GPU's schedulers (four a multiprocessor) would have under 4 warps.

    `warps` are those of one chunk of each sequence.
    """
    enough = runtime.blocks_of(tokens * warps, 16 * runtime.processors(device))
    return torch.sym_min(CHUNK, runtime.blocks_of(enough, SHORT) * SHORT)


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
    # One warp: 4 neighbouring channels for each lane, 4 tokens at once. 16 pairs hide the latency of their exponentials.
    block = 128
    blocks = runtime.blocks_of(channels, block)
    chunk = chunk_of(batch * blocks, tokens, x.device)
    later = suffix_sums(dt, dt_bias if bias_in_decay else None, softplus, chunk)
    partial = x.new_empty((batch, blocks, tokens), dtype=torch.float64)
    chunks, last = runtime.blocks_of(tokens, chunk), C[:, -1]
    runtime.launch(
        _chunk_scores, (batch * chunks * blocks,),
        x, *x.stride(), dt, *dt.stride(), A.t().contiguous(), B, *B.stride(), last, *last.stride(),
        runtime.flat(dt_bias), later, partial, tokens, channels, states, chunk, chunks, blocks,
        POOL=pool, SOFTPLUS=softplus, BIAS_IN_DECAY=bias_in_decay,
        GROUP=GROUP, BLOCK_C=block, BLOCK_T=SHORT, BLOCK_N=16, num_warps=1,
    )  # fmt: skip
    if blocks == 1:
        return partial[:, 0]
    return torch.logsumexp(2 * partial, 1) / 2 if pool == "l2" else partial.amax(1)

"""The selective scan of Mamba-1 in Triton: `simba_compile.kernels.ops.scan.selective_scan` on a GPU.

The scan is bound by its exponentials: one for each (token, channel, state), of which a streaming multiprocessor (SM) does 16
a cycle, against 128 multiply-adds. So a program is one warp that walks over the tokens with its states in registers, one
channel for each lane with all that channel's states: sums over states need no exchange. Only B and C, which all channels
share, are loaded once by the warp, and handed out through shared memory.

A short batch has too few channels to fill a GPU with such warps. Then the tokens are cut into chunks, in three passes:

1. each chunk but the last: from a state of zero, the sum of its steps Δ and its end state;
2. over the chunks, in order: ``end_c ← exp(A ΣΔ_c) end_{c−1} + end_c``, the true states at the chunks' ends;
3. each chunk: the scan from its true start state, with the outputs.

Passes 1 and 3 both take the exponentials; what pass 1 moves is x, dt and B once more. The other way, outputs from zero in
pass 1 and corrections ``C_t exp(A S_t) h_start`` in pass 3, takes as many exponentials, and writes and reads y besides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, silu, step_size

GROUP = 2  # tokens that a program loads together, one group ahead of their use; with 4, each takes more instructions
MIN_CHUNK = 32  # tokens: below, a chunk's own start and end cost as much as its tokens
CARRY_CHUNKS, CARRY_BLOCK = 8, 128  # chunks that pass 2 takes at once, and states that one of its programs carries


# --- shared by the kernels, and with scan_backward -------------------------------------------------------------------


@triton.jit
def token_at(index, stride, place, end):
    """Where the tokens at these places stand among those that entered. Past the end, the last one: no load needs a mask."""
    token = tl.minimum(place, end - 1).to(tl.int64)
    if index is not None:  # below 2^31: said so, the products with strides are of 32 by 32 bits
        token = tl.load(index + token * stride).to(tl.int32).to(tl.int64)
    return token


@triton.jit
def group_tokens(index, stride, first, end, GROUP: tl.constexpr):
    """`token_at` of each token of a group."""
    tokens = ()
    for j in tl.static_range(GROUP):
        tokens = tokens + (token_at(index, stride, first + j, end),)
    return tokens


@triton.jit
def load_channels(rows, stride, tokens, live, GROUP: tl.constexpr):
    """The rows of a group's tokens: one vector for each, an entry for each lane."""
    group = ()
    for j in tl.static_range(GROUP):
        group = group + (tl.load(rows + tokens[j] * stride, mask=live, other=0.0),)
    return group


@triton.jit
def load_states(rows, stride, tokens, live, GROUP: tl.constexpr):
    """The rows of B or C of a group's tokens: (GROUP, states), spread over the lanes by one load, and not yet converted."""
    row, token = tl.arange(0, GROUP)[:, None], tokens[0]
    for j in tl.static_range(1, GROUP):
        token = tl.where(row == j, tokens[j], token)
    at = rows[None, :] + token * stride
    return tl.load(at) if live is None else tl.load(at, mask=live[None, :], other=0.0)


@triton.jit
def pick(group, j: tl.constexpr, GROUP: tl.constexpr):
    """Row j of what `load_states` gave, in float32, as a column for the tile of states."""
    here = tl.arange(0, GROUP)[:, None] == j
    return tl.sum(tl.where(here, group.to(tl.float32), -0.0), axis=0)[:, None]


@triton.jit
def lanes(base, offsets):
    """Addresses ``base + offsets`` of a tile (state, channel), neighbours along the channels: one channel for each lane.

    They are said to be aligned to nothing. The compiler would else give a lane several neighbouring channels, for wide
    loads, and then lay out the whole loop that way: states across lanes, sums by shuffles, twice the instructions. (Of
    tiles without neighbours along the channels Triton 3.6 makes that in any case.)
    """
    return tl.multiple_of(base + offsets, [1, 1])


@triton.jit
def program_place(chunks, blocks):
    """The (sequence, chunk, block of channels) of this program; blocks vary fastest: neighbours read the same B and C."""
    program = tl.program_id(0)
    return program // blocks // chunks, program // blocks % chunks, program % blocks


# --- pass 1 ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=runtime.LENGTHS)
def chunk_kernel(
    x, x_batch, x_token, x_channel, dt, dt_batch, dt_token, dt_channel, A, B, B_batch, B_token, B_state, bias,
    index, index_batch, index_token, sums, ends, channels, chunk, chunks,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One whole chunk from a state of zero: ΣΔ to sums (batch, chunk, channel), its end to ends (…, state, channel)."""
    batch, which, block = program_place(chunks, tl.cdiv(channels, CHANNELS))
    batch = batch.to(tl.int64)
    d, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    live = d < channels
    live_n = n < STATES if STATES < PADDED else None
    both = live[None, :] & (n < STATES)[:, None]
    A = tl.load(lanes(A, n[:, None] * channels + d[None, :]), mask=both, other=0.0).to(tl.float32) * LOG2E
    shift = None if bias is None else tl.load(bias + d, mask=live, other=0.0).to(tl.float32)
    x += batch * x_batch + d.to(tl.int64) * x_channel
    dt += batch * dt_batch + d.to(tl.int64) * dt_channel
    B += batch * B_batch + n.to(tl.int64) * B_state
    if index is not None:
        index += batch * index_batch

    start = which * chunk
    end = start + chunk
    state = tl.zeros([PADDED, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    tokens = group_tokens(index, index_token, start, end, GROUP)
    next_x, next_dt = load_channels(x, x_token, tokens, live, GROUP), load_channels(dt, dt_token, tokens, live, GROUP)
    next_B = load_states(B, B_token, tokens, live_n, GROUP)
    tokens = group_tokens(index, index_token, start + GROUP, end, GROUP)
    for first in range(start, end, GROUP):
        now_x, now_dt, now_B = next_x, next_dt, next_B
        next_x, next_dt = load_channels(x, x_token, tokens, live, GROUP), load_channels(dt, dt_token, tokens, live, GROUP)
        next_B = load_states(B, B_token, tokens, live_n, GROUP)
        tokens = group_tokens(index, index_token, first + 2 * GROUP, end, GROUP)
        for j in tl.static_range(GROUP):
            delta = step_size(now_dt[j], shift, SOFTPLUS)
            total += delta
            add = pick(now_B, j, GROUP) * (delta * now_x[j].to(tl.float32))[None, :]
            state = tl.fma(tl.exp2(A * delta[None, :]), state, add)
    place = batch * chunks + which
    tl.store(sums + place * channels + d, total, mask=live)
    tl.store(lanes(ends, (place * STATES + n[:, None]) * channels + d[None, :]), state, mask=both)


# --- pass 2 ----------------------------------------------------------------------------------------------------------


@triton.jit
def compose(decay, add, later_decay, later_add):
    """Two steps ``h → decay h + add`` in one."""
    return decay * later_decay, tl.fma(later_decay, add, later_add)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def carry_kernel(
    A, sums, ends, chunks, channels, states, REVERSE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The states from zero in ends become the true ones, in the order of the chunks (backward in time if REVERSE)."""
    blocks = tl.cdiv(channels * states, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # of (state, channel)
    live = entry < channels * states
    d = entry % channels
    A = tl.load(A + entry, mask=live, other=0.0).to(tl.float32) * LOG2E
    step = tl.arange(0, CHUNKS)
    state = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, CHUNKS):
        order = first + step
        which = chunks - 1 - order if REVERSE else order
        row = batch * chunks + which.to(tl.int64)
        mask = (order < chunks)[:, None] & live[None, :]
        at = ends + row[:, None] * channels * states + entry[None, :]
        total = tl.load(sums + row[:, None] * channels + d[None, :], mask=mask, other=0.0)
        decays, adds = tl.associative_scan((tl.exp2(A[None, :] * total), tl.load(at, mask=mask, other=0.0)), 0, compose)
        adds += decays * state[None, :]
        tl.store(at, adds, mask=mask)
        state = tl.sum(tl.where(step[:, None] == CHUNKS - 1, adds, 0.0), axis=0)


# --- pass 3 ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=runtime.LENGTHS)
def scan_kernel(
    x, x_batch, x_token, x_channel, dt, dt_batch, dt_token, dt_channel, A, B, B_batch, B_token, B_state,
    C, C_batch, C_token, C_state, D, z, z_batch, z_token, z_channel, bias,
    index, index_batch, index_token, ends, y, last, tokens, channels, chunk, chunks,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One chunk from its true start state: the outputs y, and after the last chunk the state."""
    batch, which, block = program_place(chunks, tl.cdiv(channels, CHANNELS))
    batch = batch.to(tl.int64)
    d, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    live = d < channels
    live_n = n < STATES if STATES < PADDED else None
    both = live[None, :] & (n < STATES)[:, None]
    A = tl.load(lanes(A, n[:, None] * channels + d[None, :]), mask=both, other=0.0).to(tl.float32) * LOG2E
    shift = None if bias is None else tl.load(bias + d, mask=live, other=0.0).to(tl.float32)
    skip = None if D is None else tl.load(D + d, mask=live, other=0.0).to(tl.float32)
    x += batch * x_batch + d.to(tl.int64) * x_channel
    dt += batch * dt_batch + d.to(tl.int64) * dt_channel
    B += batch * B_batch + n.to(tl.int64) * B_state
    C += batch * C_batch + n.to(tl.int64) * C_state
    if z is not None:
        z += batch * z_batch + d.to(tl.int64) * z_channel
    if index is not None:
        index += batch * index_batch

    start = which * chunk
    end = tl.minimum(start + chunk, tokens)
    y += (batch * tokens + start) * channels + d
    state = tl.zeros([PADDED, CHANNELS], tl.float32)
    if ends is not None:
        before = batch * (chunks - 1) + which - 1
        has = both & (d < tl.where(which > 0, channels, 0))[None, :]
        state += tl.load(lanes(ends, (before * STATES + n[:, None]) * channels + d[None, :]), mask=has, other=0.0)
    kept = group_tokens(index, index_token, start, end, GROUP)
    next_x, next_dt = load_channels(x, x_token, kept, live, GROUP), load_channels(dt, dt_token, kept, live, GROUP)
    next_B, next_C = load_states(B, B_token, kept, live_n, GROUP), load_states(C, C_token, kept, live_n, GROUP)
    next_z = next_x
    if z is not None:
        next_z = load_channels(z, z_token, group_tokens(None, 0, start, end, GROUP), live, GROUP)
    kept = group_tokens(index, index_token, start + GROUP, end, GROUP)
    for first in range(start, end, GROUP):
        now_x, now_dt, now_B, now_C, now_z = next_x, next_dt, next_B, next_C, next_z
        next_x, next_dt = load_channels(x, x_token, kept, live, GROUP), load_channels(dt, dt_token, kept, live, GROUP)
        next_B, next_C = load_states(B, B_token, kept, live_n, GROUP), load_states(C, C_token, kept, live_n, GROUP)
        if z is not None:
            next_z = load_channels(z, z_token, group_tokens(None, 0, first + GROUP, end, GROUP), live, GROUP)
        kept = group_tokens(index, index_token, first + 2 * GROUP, end, GROUP)
        for j in tl.static_range(GROUP):
            inside = d < tl.where(first + j < end, channels, 0)
            value = now_x[j].to(tl.float32)
            delta = tl.where(inside, step_size(now_dt[j], shift, SOFTPLUS), 0.0)  # past the end: no step
            state = tl.fma(tl.exp2(A * delta[None, :]), state, pick(now_B, j, GROUP) * (delta * value)[None, :])
            output = tl.sum(state * pick(now_C, j, GROUP), axis=0)
            if D is not None:
                output += skip * value
            if z is not None:
                output *= silu(now_z[j].to(tl.float32))
            tl.store(y + j * channels, output.to(y.dtype.element_ty), mask=inside)
        y += GROUP * channels
    if which == chunks - 1:
        tl.store(last + (batch * channels + d[None, :]) * STATES + n[:, None], state, mask=both)


# --- launching -------------------------------------------------------------------------------------------------------


def tile_of(states: int) -> dict[str, int]:
    """States, channels and tokens that a program's one warp holds: 16 states for each lane, in about 120 registers.

    Up to 16 states (every published Mamba-1), a lane has all the states of its channel; with more, several lanes share one.
    """
    padded = runtime.power_of_two(states)
    return {"STATES": states, "PADDED": padded, "CHANNELS": max(1, 32 * 16 // max(16, padded)), "GROUP": GROUP}


def split(batch: int, tokens: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """The tokens of a chunk, and how many chunks there are.

    A GPU with S multiprocessors has 4 S schedulers. Chunks take 1.7 times the instructions, and as many warps as hide the
    latencies: 4 for each scheduler. One warp alone waits for itself a third of the time or more. So chunks pay where fewer
    than three of four schedulers would have a warp at all (counted, not timed).
    """
    processors = runtime.processors(device)
    warps = batch * blocks
    if warps >= 3 * processors or tokens <= MIN_CHUNK:
        return tokens, 1
    chunk = torch.sym_max(MIN_CHUNK, runtime.blocks_of(tokens * warps, 16 * processors))
    chunk = runtime.blocks_of(chunk, GROUP) * GROUP
    return chunk, runtime.blocks_of(tokens, chunk)


def strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """A tensor's strides; zeros for one that is missing."""
    return (0,) * axes if x is None else x.stride()


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.scan.selective_scan`."""
    batch, tokens, channels = x.shape
    states = A.shape[1]
    runtime.expect(
        dt=(dt, (batch, tokens, channels)), A=(A, (channels, states)), B=(B, (batch, tokens, states)),
        C=(C, (batch, tokens, states)), D=(D, (channels,)), dt_bias=(dt_bias, (channels,)),
    )  # fmt: skip
    if index is not None:
        tokens = index.shape[1]
        runtime.expect(index=(index, (batch, tokens)))
    runtime.expect(z=(z, (batch, tokens, channels)))
    y = x.new_empty((batch, tokens, channels))
    last = x.new_empty((batch, channels, states), dtype=torch.float32)
    if y.numel() == 0:
        return y, last.zero_()
    A, D, dt_bias = A.t().contiguous(), runtime.flat(D), runtime.flat(dt_bias)  # lanes have neighbouring channels
    tile = tile_of(states)
    blocks = runtime.blocks_of(channels, tile["CHANNELS"])
    chunk, chunks = split(batch, tokens, blocks, x.device)
    ends = None
    if chunks > 1:
        ends = chunk_states(x, dt, A, B, dt_bias, softplus, index, chunk, chunks - 1)
    runtime.launch(
        scan_kernel, (batch * chunks * blocks,),
        x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(), C, *C.stride(), D, z, *strides(z, 3), dt_bias,
        index, *strides(index, 2), ends, y, last, tokens, channels, chunk, chunks,
        SOFTPLUS=softplus, **tile, num_warps=1,
    )  # fmt: skip
    return y, last


def chunk_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    index: Tensor | None,
    chunk: int,
    chunks: int,
) -> Tensor:
    """Passes 1 and 2: the state after each of the first `chunks` chunks, (batch · chunk, state, channel).

    A is laid out as they are: (state, channel).
    """
    batch, (states, channels) = x.shape[0], A.shape
    tile = tile_of(states)
    sums = x.new_empty((batch * chunks, channels), dtype=torch.float32)
    ends = x.new_empty((batch * chunks, states, channels), dtype=torch.float32)
    runtime.launch(
        chunk_kernel, (batch * chunks * runtime.blocks_of(channels, tile["CHANNELS"]),),
        x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(), dt_bias, index, *strides(index, 2), sums, ends,
        channels, chunk, chunks, SOFTPLUS=softplus, **tile, num_warps=1,
    )  # fmt: skip
    carry(A, sums, ends, chunks, reverse=False)
    return ends


def carry(A: Tensor, sums: Tensor, ends: Tensor, chunks: int, reverse: bool) -> None:
    """Pass 2, in place on `ends`."""
    rows, states, channels = ends.shape
    runtime.launch(
        carry_kernel, (rows // chunks * runtime.blocks_of(channels * states, CARRY_BLOCK),),
        A, sums, ends, chunks, channels, states,
        REVERSE=reverse, CHUNKS=CARRY_CHUNKS, BLOCK=CARRY_BLOCK, num_warps=1,
    )  # fmt: skip

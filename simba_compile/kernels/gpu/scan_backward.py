"""The gradients of the selective scan in Triton: `simba_compile.kernels.ops.scan.selective_scan_backward` on a GPU.

The forward pass keeps nothing but its inputs. With h the states and g their gradients (the adjoint), both recurrences

    h_t = decay_t h_{t−1} + Δ_t x_t B_t            g_{t−1} = decay_t (g_t + ∂y_t C_t)            decay_t = exp(Δ_t A)

are cut into chunks of 16 tokens, as `scan` does it:

1. `scan.chunk_states`: h before each chunk, in the order of time;
2. `adjoint_kernel` and a carry against time: g after each chunk;
3. `gradient_kernel`: each chunk on its own, group of tokens by group from its end. A group's states are computed again from
   the chunk's start, since a decay cannot be undone: 0, 2, … 14 further steps for a group of 2, so 3.5 a token. States kept
   every 2 tokens would save them, and take eight times the memory of those kept every 16.

B and C are shared by all channels and A, D and the bias by all tokens: every program writes its own part of their gradients,
and torch adds the parts up, in the same order in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, sigmoid, step_size
from simba_compile.kernels.gpu.scan import (
    carry,
    chunk_states,
    group_tokens,
    lanes,
    load_channels,
    load_states,
    pick,
    program_place,
    strides,
    tile_of,
)

CHUNK = 16  # tokens


@triton.jit(do_not_specialize=runtime.LENGTHS)
def adjoint_kernel(
    dt, dt_batch, dt_token, dt_channel, A, C, C_batch, C_token, C_state, z, z_batch, z_token, z_channel, bias,
    grad, grad_batch, grad_token, grad_channel, grad_state, sums, ends, tokens, channels, chunk, chunks,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Chunk i + 1, backward from g = 0 (the last one: from grad_state): ΣΔ to sums[i], and g before the chunk to ends[i]."""
    batch, entry, block = program_place(chunks - 1, tl.cdiv(channels, CHANNELS))
    batch = batch.to(tl.int64)
    d, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    live = d < channels
    live_n = n < STATES if STATES < PADDED else None
    both = live[None, :] & (n < STATES)[:, None]
    A = tl.load(lanes(A, n[:, None] * channels + d[None, :]), mask=both, other=0.0).to(tl.float32) * LOG2E
    shift = None if bias is None else tl.load(bias + d, mask=live, other=0.0).to(tl.float32)
    dt += batch * dt_batch + d.to(tl.int64) * dt_channel
    grad += batch * grad_batch + d.to(tl.int64) * grad_channel
    C += batch * C_batch + n.to(tl.int64) * C_state
    if z is not None:
        z += batch * z_batch + d.to(tl.int64) * z_channel

    start = (entry + 1) * chunk
    end = tl.minimum(start + chunk, tokens)
    adjoint = tl.zeros([PADDED, CHANNELS], tl.float32)
    if grad_state is not None:
        has = both & (d < tl.where(entry == chunks - 2, channels, 0))[None, :]
        after = lanes(grad_state, (batch * STATES + n[:, None]) * channels + d[None, :])
        adjoint += tl.load(after, mask=has, other=0.0).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    groups = tl.cdiv(end - start, GROUP)
    for i in range(groups):
        first = start + (groups - 1 - i) * GROUP
        at = group_tokens(None, 0, first, end, GROUP)
        raw, grads = load_channels(dt, dt_token, at, live, GROUP), load_channels(grad, grad_token, at, live, GROUP)
        rows_C = load_states(C, C_token, at, live_n, GROUP)
        gates = raw
        if z is not None:
            gates = load_channels(z, z_token, at, live, GROUP)
        for j in tl.static_range(GROUP - 1, -1, -1):
            inside = d < tl.where(first + j < end, channels, 0)
            delta = tl.where(inside, step_size(raw[j], shift, SOFTPLUS), 0.0)
            g = tl.where(inside, grads[j].to(tl.float32), 0.0)
            if z is not None:
                gate = gates[j].to(tl.float32)
                g *= gate * sigmoid(gate)
            total += delta
            adjoint = tl.fma(pick(rows_C, j, GROUP), g[None, :], adjoint) * tl.exp2(A * delta[None, :])
    place = batch * (chunks - 1) + entry
    tl.store(sums + place * channels + d, total, mask=live)
    tl.store(lanes(ends, (place * STATES + n[:, None]) * channels + d[None, :]), adjoint, mask=both)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def gradient_kernel(
    x, x_batch, x_token, x_channel, dt, dt_batch, dt_token, dt_channel, A, B, B_batch, B_token, B_state,
    C, C_batch, C_token, C_state, D, z, z_batch, z_token, z_channel, bias,
    grad, grad_batch, grad_token, grad_channel, grad_state, starts, ends,
    dx, ddt, dA, dB, dC, dD, dz, dbias, tokens, channels, chunk, chunks,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One chunk, from the true h before it and the true g after it: all gradients, or this program's part of them."""
    blocks = tl.cdiv(channels, CHANNELS)
    batch, which, block = program_place(chunks, blocks)
    batch = batch.to(tl.int64)
    d, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    live = d < channels
    live_n = n < STATES if STATES < PADDED else None
    both = live[None, :] & (n < STATES)[:, None]
    A = tl.load(lanes(A, n[:, None] * channels + d[None, :]), mask=both, other=0.0).to(tl.float32)
    shift = None if bias is None else tl.load(bias + d, mask=live, other=0.0).to(tl.float32)
    skip = None if D is None else tl.load(D + d, mask=live, other=0.0).to(tl.float32)
    x += batch * x_batch + d.to(tl.int64) * x_channel
    dt += batch * dt_batch + d.to(tl.int64) * dt_channel
    grad += batch * grad_batch + d.to(tl.int64) * grad_channel
    B += batch * B_batch + n.to(tl.int64) * B_state
    C += batch * C_batch + n.to(tl.int64) * C_state
    if z is not None:
        z += batch * z_batch + d.to(tl.int64) * z_channel

    start = which * chunk
    end = tl.minimum(start + chunk, tokens)
    adjoint = tl.zeros([PADDED, CHANNELS], tl.float32)
    if starts is not None:  # more than one chunk
        place = batch * (chunks - 1) + which
        has = both & (d < tl.where(which < chunks - 1, channels, 0))[None, :]
        adjoint += tl.load(lanes(ends, (place * STATES + n[:, None]) * channels + d[None, :]), mask=has, other=0.0)
    if grad_state is not None:
        has = both & (d < tl.where(which == chunks - 1, channels, 0))[None, :]
        after = lanes(grad_state, (batch * STATES + n[:, None]) * channels + d[None, :])
        adjoint += tl.load(after, mask=has, other=0.0).to(tl.float32)
    sum_A = tl.zeros([PADDED, CHANNELS], tl.float32)
    sum_D, sum_bias = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    groups = tl.cdiv(end - start, GROUP)
    for i in range(groups):
        now = start + (groups - 1 - i) * GROUP
        state = tl.zeros([PADDED, CHANNELS], tl.float32)
        if starts is not None:  # read again for each group: it is in the cache, and registers are few
            before = batch * (chunks - 1) + which - 1
            has = both & (d < tl.where(which > 0, channels, 0))[None, :]
            state += tl.load(lanes(starts, (before * STATES + n[:, None]) * channels + d[None, :]), mask=has, other=0.0)
        for first in range(start, now, GROUP):  # to the start of this group
            at = group_tokens(None, 0, first, end, GROUP)
            raw, xs = load_channels(dt, dt_token, at, live, GROUP), load_channels(x, x_token, at, live, GROUP)
            rows_B = load_states(B, B_token, at, live_n, GROUP)
            for j in tl.static_range(GROUP):
                delta = step_size(raw[j], shift, SOFTPLUS)
                add = pick(rows_B, j, GROUP) * (delta * xs[j].to(tl.float32))[None, :]
                state = tl.fma(tl.exp2(A * (delta * LOG2E)[None, :]), state, add)

        at = group_tokens(None, 0, now, end, GROUP)
        raw, xs = load_channels(dt, dt_token, at, live, GROUP), load_channels(x, x_token, at, live, GROUP)
        rows_B, rows_C = load_states(B, B_token, at, live_n, GROUP), load_states(C, C_token, at, live_n, GROUP)
        grads = load_channels(grad, grad_token, at, live, GROUP)
        gates = raw
        if z is not None:
            gates = load_channels(z, z_token, at, live, GROUP)
        states, deltas, decays = (state,), (), ()  # states: before the group and after each of its tokens
        for j in tl.static_range(GROUP):
            delta = tl.where(d < tl.where(now + j < end, channels, 0), step_size(raw[j], shift, SOFTPLUS), 0.0)
            decay = tl.exp2(A * (delta * LOG2E)[None, :])
            state = tl.fma(decay, state, pick(rows_B, j, GROUP) * (delta * xs[j].to(tl.float32))[None, :])
            states, deltas, decays = states + (state,), deltas + (delta,), decays + (decay,)
        for j in tl.static_range(GROUP - 1, -1, -1):
            inside = d < tl.where(now + j < end, channels, 0)
            delta, value, b, c = deltas[j], xs[j].to(tl.float32), pick(rows_B, j, GROUP), pick(rows_C, j, GROUP)
            g = tl.where(inside, grads[j].to(tl.float32), 0.0)
            if z is not None:
                gate, before_gate = gates[j].to(tl.float32), g
                share = sigmoid(gate)
                g *= gate * share
            part = ((batch * blocks + block) * tokens + now + j) * STATES + n
            mask_n = n < tl.where(now + j < end, STATES, 0)
            tl.store(dC + part, tl.sum(g[None, :] * states[j + 1], axis=1), mask=mask_n)
            y = tl.sum(states[j + 1] * c, axis=0)
            adjoint = tl.fma(g[None, :], c, adjoint)
            tl.store(dB + part, tl.sum(adjoint * (delta * value)[None, :], axis=1), mask=mask_n)
            from_B = tl.sum(adjoint * b, axis=0)
            adjoint *= decays[j]
            through = adjoint * states[j]
            sum_A = tl.fma(through, delta[None, :], sum_A)
            gradient_x, gradient_dt = delta * from_B, tl.fma(value, from_B, tl.sum(through * A, axis=0))
            if SOFTPLUS:
                gradient_dt *= sigmoid(step_size(raw[j], shift, False))
            gradient_dt = tl.where(inside, gradient_dt, 0.0)
            sum_bias += gradient_dt
            if D is not None:
                gradient_x += g * skip
                y += value * skip
                sum_D += g * value

            token = (batch * tokens + now + j) * channels + d
            tl.store(dx + token, gradient_x.to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + token, gradient_dt.to(ddt.dtype.element_ty), mask=inside)
            if z is not None:
                gradient_z = before_gate * y * share * (1 + gate * (1 - share))
                tl.store(dz + token, gradient_z.to(dz.dtype.element_ty), mask=inside)
    part = batch * chunks + which
    tl.store(lanes(dA, (part * STATES + n[:, None]) * channels + d[None, :]), sum_A, mask=both)
    if D is not None:
        tl.store(dD + part * channels + d, sum_D, mask=live)
    if bias is not None:
        tl.store(dbias + part * channels + d, sum_bias, mask=live)


def selective_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """See `simba_compile.kernels.ops.scan.selective_scan_backward`."""
    batch, tokens, channels = x.shape
    states, wide = A.shape[1], torch.float32
    runtime.expect(
        grad=(grad, (batch, tokens, channels)), grad_state=(grad_state, (batch, channels, states)),
        dt=(dt, (batch, tokens, channels)), A=(A, (channels, states)), B=(B, (batch, tokens, states)),
        C=(C, (batch, tokens, states)), D=(D, (channels,)), z=(z, (batch, tokens, channels)), dt_bias=(dt_bias, (channels,)),
    )  # fmt: skip
    A, D, dt_bias = A.t().contiguous(), runtime.flat(D), runtime.flat(dt_bias)
    grad_state = None if grad_state is None else grad_state.transpose(1, 2).contiguous()
    tile = tile_of(states)
    narrow = tile | {"CHANNELS": max(1, tile["CHANNELS"] // 4)}  # it holds a group's decays and states, besides
    blocks, chunks = runtime.blocks_of(channels, narrow["CHANNELS"]), runtime.blocks_of(tokens, CHUNK)
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    dz = x.new_empty(0 if z is None else x.shape)
    dA = x.new_empty((batch * chunks, states, channels), dtype=wide)
    dB, dC = (x.new_empty((batch, blocks, tokens, states), dtype=wide) for _ in range(2))
    dD, dbias = (x.new_empty((batch * chunks, channels) if value is not None else 0, dtype=wide) for value in (D, dt_bias))
    if x.numel():
        starts = ends = None
        if chunks > 1:
            starts = chunk_states(x, dt, A, B, dt_bias, softplus, None, CHUNK, chunks - 1)
            sums = x.new_empty((batch * (chunks - 1), channels), dtype=wide)
            ends = torch.empty_like(starts)
            runtime.launch(
                adjoint_kernel, (batch * (chunks - 1) * runtime.blocks_of(channels, tile["CHANNELS"]),),
                dt, *dt.stride(), A, C, *C.stride(), z, *strides(z, 3), dt_bias,
                grad, *grad.stride(), grad_state, sums, ends, tokens, channels, CHUNK, chunks,
                SOFTPLUS=softplus, **tile, num_warps=1,
            )  # fmt: skip
            carry(A, sums, ends, chunks - 1, reverse=True)
        runtime.launch(
            gradient_kernel, (batch * chunks * blocks,),
            x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(), C, *C.stride(), D, z, *strides(z, 3), dt_bias,
            grad, *grad.stride(), grad_state, starts, ends, dx, ddt, dA, dB, dC, dD, dz, dbias,
            tokens, channels, CHUNK, chunks, SOFTPLUS=softplus, **narrow, num_warps=1,
        )  # fmt: skip
    dD, dbias = (value.sum(0) if value.dim() == 2 else value for value in (dD, dbias))
    return dx, ddt, dA.sum(0).t().contiguous(), dB.sum(1).to(x.dtype), dC.sum(1).to(x.dtype), dD, dz, dbias

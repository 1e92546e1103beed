"""The gradients of Mamba-2's scan in Triton: `simba_compile.kernels.ops.ssd.ssd_scan_backward` on a GPU.

With λ_t the gradient of the state h_t, ``λ_{t−1} = exp(Δ_t A) (λ_t + ∂y_t ⊗ C_t)`` is the forward recurrence against time:
it is cut into the same chunks, and the same kernel walks along them (`ssd.chunk_states`). With ``a_t`` the running sum of
Δ A in a chunk, ``L_rs = exp(a_r − a_s)`` for s ≤ r, and ``K_rs = (C_r · B_s) (∂y_r · x_s) L_rs``, these are matrix products:

1. `_to_x`: ``∂x_s = Δ_s (Σ_r (C_r · B_s) L_rs ∂y_r + exp(a_end − a_s) λ_end B_s) + D ∂y_s``;
2. `_to_B_and_C`: ``∂C_r = Σ_s (∂y_r · x_s) L_rs Δ_s B_s + exp(a_r) ∂y_r h_start``, and likewise ∂B;
3. `_to_dt`: ∂Δ, and with it the parts of ∂A.

In one kernel they would not fit the registers. The gradient of a decay's logarithm is the sum of the terms that pass through
it, ``Σ_{s<t≤r} K_rs Δ_s`` and those of h_start and λ_end: it is summed up so, and not as the difference of two running sums,
in which it would cancel.

As in `ssd`, the factors of a product are in x's type (∂y is rounded to it) and its sums in float32. Every program writes its
own part of what several heads or chunks share, and torch adds the parts up, in the same order in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import clamp, sigmoid, step_size
from simba_compile.kernels.gpu.ssd import chunk_states, steps, tile_of


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _to_x(
    grad, grad_batch, grad_token, grad_head, grad_p, dt, dt_batch, dt_token, dt_head, A,
    B, B_batch, B_token, B_group, B_state, C, C_batch, C_token, C_group, C_state, D, bias, after, dx,
    tokens, chunks, heads, share, size, states, low, high,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and block of a head's channels."""
    blocks = tl.cdiv(size, BLOCK_P)
    program = tl.program_id(0)
    block, head, chunk = program % blocks, program // blocks % heads, program // blocks // heads % chunks
    batch = (program // blocks // heads // chunks).to(tl.int64)
    start, row = (chunk * CHUNK).to(tl.int64), tl.arange(0, CHUNK)
    p, last = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.minimum(CHUNK, tokens - chunk * CHUNK) - 1
    at, inside = tl.minimum(row, last), row <= last
    grad += batch * grad_batch + head.to(tl.int64) * grad_head + start * grad_token
    B += batch * B_batch + (head // share).to(tl.int64) * B_group + start * B_token
    C += batch * C_batch + (head // share).to(tl.int64) * C_group + start * C_token
    dt += batch * dt_batch + head.to(tl.int64) * dt_head + start * dt_token
    after += ((batch * chunks + chunk) * heads + head) * size * states
    delta, decay = steps(dt, bias, head, at, dt_token, A, inside, low, high, SOFTPLUS)
    since = tl.cumsum(decay, axis=0)

    products = tl.zeros([CHUNK, CHUNK], tl.float32)  # (s, r)
    carried = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    live = (p < size)[None, :]
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = tl.load(B + (at[:, None] * B_token + n[None, :] * B_state), mask=(n < states)[None, :], other=0.0)
        c = tl.load(C + (at[None, :] * C_token + n[:, None] * C_state), mask=(n < states)[:, None], other=0.0)
        products = tl.dot(b, c, products, input_precision=PRECISION)
        adjoint = tl.load(after + (p[None, :] * states + n[:, None]), mask=(n < states)[:, None] & live, other=0.0)
        carried = tl.dot(b, adjoint.to(b.dtype), carried, input_precision=PRECISION)
    between = tl.where((row[:, None] <= row[None, :]) & inside[None, :], since[None, :] - since[:, None], float("-inf"))
    products *= tl.exp2(between)
    g = tl.load(grad + (at[:, None] * grad_token + p[None, :] * grad_p), mask=live, other=0.0)
    carried *= tl.exp2(tl.sum(decay, axis=0) - since)[:, None]
    out = tl.dot(products.to(g.dtype), g, carried, input_precision=PRECISION) * delta[:, None]
    if D is not None:
        out += g.to(tl.float32) * tl.load(D + head).to(tl.float32)
    token = batch * tokens + start + row
    tl.store(dx + (token[:, None] * heads + head) * size + p[None, :], out, mask=inside[:, None] & live)


@triton.jit
def _pairs(
    grad, grad_token, grad_p, x, x_token, x_p, at, size,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂y_r · x_s of a chunk, (r, s)."""
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in range(0, size, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        g = tl.load(grad + (at[:, None] * grad_token + p[None, :] * grad_p), mask=(p < size)[None, :], other=0.0)
        u = tl.load(x + (at[None, :] * x_token + p[:, None] * x_p), mask=(p < size)[:, None], other=0.0)
        pairs = tl.dot(g, u, pairs, input_precision=PRECISION)
    return pairs


@triton.jit
def _decays(since, row, inside):
    """L of a chunk, (r, s): how much of a step at s is left at r; none past the sequence's end."""
    live = (row[:, None] >= row[None, :]) & inside[:, None]
    return tl.exp2(tl.where(live, since[:, None] - since[None, :], float("-inf")))


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _to_B_and_C(
    grad, grad_batch, grad_token, grad_head, grad_p, x, x_batch, x_token, x_head, x_p, dt, dt_batch, dt_token, dt_head, A,
    B, B_batch, B_token, B_group, B_state, C, C_batch, C_token, C_group, C_state, bias, before, after,
    dB, dC, from_start, to_end, through, tokens, chunks, heads, share, size, states, low, high,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head: its dB and dC, and the terms that its start and end states take part in.

    from_start: ∂y_r through h_start, for each token r; to_end: λ_end through the step at s, without Δ_s, for each token s;
    through: λ_end through h_start, for each chunk.
    """
    program = tl.program_id(0)
    head, chunk, batch = program % heads, program // heads % chunks, (program // heads // chunks).to(tl.int64)
    start, row = (chunk * CHUNK).to(tl.int64), tl.arange(0, CHUNK)
    last = tl.minimum(CHUNK, tokens - chunk * CHUNK) - 1
    at, inside = tl.minimum(row, last), row <= last
    grad += batch * grad_batch + head.to(tl.int64) * grad_head + start * grad_token
    x += batch * x_batch + head.to(tl.int64) * x_head + start * x_token
    B += batch * B_batch + (head // share).to(tl.int64) * B_group + start * B_token
    C += batch * C_batch + (head // share).to(tl.int64) * C_group + start * C_token
    dt += batch * dt_batch + head.to(tl.int64) * dt_head + start * dt_token
    held = ((batch * chunks + chunk) * heads + head) * (size * states)
    before, after = before + held, after + held
    delta, decay = steps(dt, bias, head, at, dt_token, A, inside, low, high, SOFTPLUS)
    since, total = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
    pairs = _pairs(grad, grad_token, grad_p, x, x_token, x_p, at, size, CHUNK, BLOCK_P, PRECISION)
    shares = (pairs * _decays(since, row, inside)).to(x.dtype.element_ty)

    start_terms, end_terms = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    products = tl.zeros([BLOCK_P], tl.float32)
    place = ((batch * tokens + start) * heads + head) * states
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        known = (n < states)[None, :]
        out = at[:, None] * heads * states + n[None, :]
        b = tl.load(B + (at[:, None] * B_token + n[None, :] * B_state), mask=known, other=0.0)
        c = tl.load(C + (at[:, None] * C_token + n[None, :] * C_state), mask=known, other=0.0)

        to_C = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        for second in range(0, size, BLOCK_P):
            p = second + tl.arange(0, BLOCK_P)
            state = tl.load(before + (p[:, None] * states + n[None, :]), mask=(p < size)[:, None] & known, other=0.0)
            g = tl.load(grad + (at[:, None] * grad_token + p[None, :] * grad_p), mask=(p < size)[None, :], other=0.0)
            to_C = tl.dot(g, state.to(g.dtype), to_C, input_precision=PRECISION)
        to_C *= tl.where(inside, tl.exp2(since), 0.0)[:, None]
        start_terms += tl.sum(to_C * c.to(tl.float32), axis=1)
        to_C = tl.dot(shares, (b.to(tl.float32) * delta[:, None]).to(b.dtype), to_C, input_precision=PRECISION)
        tl.store(dC + place + out, to_C, mask=inside[:, None] & known)

        to_B = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        for second in range(0, size, BLOCK_P):
            p = second + tl.arange(0, BLOCK_P)
            both = (p < size)[:, None] & known
            adjoint = tl.load(after + (p[:, None] * states + n[None, :]), mask=both, other=0.0)
            state = tl.load(before + (p[:, None] * states + n[None, :]), mask=both, other=0.0)  # from the cache
            products += tl.sum(state * adjoint, axis=1)
            u = tl.load(x + (at[:, None] * x_token + p[None, :] * x_p), mask=(p < size)[None, :], other=0.0)
            to_B = tl.dot(u, adjoint.to(u.dtype), to_B, input_precision=PRECISION)
        to_B *= tl.exp2(total - since)[:, None]
        end_terms += tl.sum(to_B * b.to(tl.float32), axis=1)
        to_B = tl.dot(tl.trans(shares), c, to_B, input_precision=PRECISION) * delta[:, None]
        tl.store(dB + place + out, to_B, mask=inside[:, None] & known)
    token = (batch * tokens + start + row) * heads + head
    tl.store(from_start + token, start_terms, mask=inside)
    tl.store(to_end + token, end_terms, mask=inside)
    tl.store(through + (batch * chunks + chunk) * heads + head, tl.exp2(total) * tl.sum(products, axis=0))


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _to_dt(
    grad, grad_batch, grad_token, grad_head, grad_p, x, x_batch, x_token, x_head, x_p, dt, dt_batch, dt_token, dt_head, A,
    B, B_batch, B_token, B_group, B_state, C, C_batch, C_token, C_group, C_state, bias, from_start, to_end, through,
    ddt, dA, dD, tokens, chunks, heads, share, size, states, low, high,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head: ddt and its part of dD for each token, and its part of dA."""
    program = tl.program_id(0)
    head, chunk, batch = program % heads, program // heads % chunks, (program // heads // chunks).to(tl.int64)
    start, row = (chunk * CHUNK).to(tl.int64), tl.arange(0, CHUNK)
    last = tl.minimum(CHUNK, tokens - chunk * CHUNK) - 1
    at, inside = tl.minimum(row, last), row <= last
    grad += batch * grad_batch + head.to(tl.int64) * grad_head + start * grad_token
    x += batch * x_batch + head.to(tl.int64) * x_head + start * x_token
    B += batch * B_batch + (head // share).to(tl.int64) * B_group + start * B_token
    C += batch * C_batch + (head // share).to(tl.int64) * C_group + start * C_token
    dt += batch * dt_batch + head.to(tl.int64) * dt_head + start * dt_token
    delta, decay = steps(dt, bias, head, at, dt_token, A, inside, low, high, SOFTPLUS)
    since = tl.cumsum(decay, axis=0)
    pairs = _pairs(grad, grad_token, grad_p, x, x_token, x_p, at, size, CHUNK, BLOCK_P, PRECISION)
    part, token = (batch * chunks + chunk) * heads + head, (batch * tokens + start + row) * heads + head
    tl.store(dD + token, tl.sum(tl.where(row[:, None] == row[None, :], pairs, 0.0), axis=1), mask=inside)

    products = tl.zeros([CHUNK, CHUNK], tl.float32)  # C_r · B_s
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        c = tl.load(C + (at[:, None] * C_token + n[None, :] * C_state), mask=(n < states)[None, :], other=0.0)
        b = tl.load(B + (at[None, :] * B_token + n[:, None] * B_state), mask=(n < states)[:, None], other=0.0)
        products = tl.dot(c, b, products, input_precision=PRECISION)
    products *= pairs * _decays(since, row, inside)  # K

    start_terms = tl.load(from_start + token, mask=inside, other=0.0)
    end_terms = tl.load(to_end + token, mask=inside, other=0.0)
    to_step = tl.sum(products, axis=0) + end_terms
    passing = tl.cumsum(products, axis=0, reverse=True) + end_terms[None, :]
    passing = tl.where(row[None, :] < row[:, None], passing * delta[None, :], 0.0)
    to_log = tl.sum(passing, axis=1) + tl.cumsum(start_terms, axis=0, reverse=True) + tl.load(through + part)
    tl.store(dA + part, tl.sum(to_log * delta, axis=0))

    raw = tl.load(dt + at * dt_token).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head).to(tl.float32)
    free = step_size(raw, None, SOFTPLUS)
    gradient = tl.where(free == clamp(free, low, high), to_log * tl.load(A + head).to(tl.float32) + to_step, 0.0)
    if SOFTPLUS:
        gradient *= sigmoid(raw)
    tl.store(ddt + token, gradient, mask=inside)


def ssd_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    initial: Tensor | None,
) -> tuple[Tensor, ...]:
    """See `simba_compile.kernels.ops.ssd.ssd_scan_backward`."""
    (batch, tokens, heads, size), (groups, states) = x.shape, B.shape[2:]
    runtime.expect(
        grad=(grad, tuple(x.shape)), grad_state=(grad_state, (batch, heads, size, states)), dt=(dt, (batch, tokens, heads)),
        A=(A, (heads,)), B=(B, (batch, tokens, groups, states)), C=(C, tuple(B.shape)), D=(D, (heads,)),
        dt_bias=(dt_bias, (heads,)), initial=(initial, (batch, heads, size, states)),
    )  # fmt: skip
    runtime.expect_groups(groups, heads=heads)
    A, D, dt_bias = A.contiguous(), runtime.flat(D), runtime.flat(dt_bias)
    wide = torch.float32
    tile = tile_of(x, states)
    chunks = runtime.blocks_of(tokens, tile["CHUNK"])
    dx = x.new_empty(x.shape)
    ddt, dD, from_start, to_end = (x.new_empty(dt.shape, dtype=wide) for _ in range(4))
    dB, dC = (x.new_empty((batch, tokens, heads, states), dtype=wide) for _ in range(2))
    dA, through = (x.new_empty((batch * chunks, heads), dtype=wide) for _ in range(2))
    if x.numel() == 0:
        start = x.new_zeros((batch, heads, size, states), dtype=wide) + (0 if grad_state is None else grad_state)
    else:
        grad, B, C = (value.to(x.dtype) for value in (grad, B, C))
        limits = (dt_min, dt_max)
        before, _ = chunk_states(x, dt, A, B, dt_bias, softplus, limits, initial, None, wide)
        after, start = chunk_states(grad, dt, A, C, dt_bias, softplus, limits, grad_state, None, wide, reverse=True)
        shape = (tokens, chunks, heads, heads // groups, size, states, dt_min, dt_max)
        of_x = (grad, *grad.stride(), x, *x.stride())
        of_dt = (dt, *dt.stride(), A, B, *B.stride(), C, *C.stride())
        tile["BLOCK_N"] = max(16, min(32, runtime.power_of_two(states)))
        constants = {"SOFTPLUS": softplus, **tile, "num_warps": 8, "num_stages": 1}
        narrow = constants | {name: max(16, tile[name] // 2) for name in ("BLOCK_P", "BLOCK_N")}
        runtime.launch(
            _to_x, (batch * chunks * heads * runtime.blocks_of(size, tile["BLOCK_P"]),),
            grad, *grad.stride(), *of_dt, D, dt_bias, after, dx, *shape, **constants,
        )  # fmt: skip
        grid = (batch * chunks * heads,)
        runtime.launch(
            _to_B_and_C, grid, *of_x, *of_dt, dt_bias, before, after, dB, dC, from_start, to_end, through, *shape, **narrow
        )
        runtime.launch(_to_dt, grid, *of_x, *of_dt, dt_bias, from_start, to_end, through, ddt, dA, dD, *shape, **narrow)
    of_group = (batch, tokens, groups, heads // groups, states)
    none = x.new_empty(0, dtype=wide)
    return (
        dx, ddt.to(dt.dtype), dA.sum(0), dB.view(of_group).sum(3).to(B.dtype), dC.view(of_group).sum(3).to(C.dtype),
        none if D is None else dD.sum((0, 1)), none.clone() if dt_bias is None else ddt.sum((0, 1)),
        none.clone() if initial is None else start,
    )  # fmt: skip

"""The scan of Mamba-2 in Triton: `simba_compile.kernels.ops.ssd.ssd_scan` on a GPU, as matrix products (Dao & Gu 2024).

A head's decay is one number, so within a chunk of tokens the recurrence is a masked matrix product. With ``a_t`` the running
sum of Δ A within the chunk:

1. `_states`: the state at the start of each chunk, by ``h ← exp(a_end) h + Σ_t exp(a_end − a_t) Δ_t x_t ⊗ B_t``;
2. `_outputs`: ``y_t = Σ_{s≤t} (C_t · B_s) exp(a_t − a_s) Δ_s x_s + exp(a_t) h_start C_t + D x_t``.

The first walks along the chunks, with a block of a head's state in registers. All chunks at once, and a pass that carries
states from one to the next, would write and read each state twice, in float32: several times the bytes of x and y.

The factors of a product are in x's type, its sums in float32, as in mamba-ssm. Float32 keeps its precision: NVIDIA's tensor
cores make one product of three in TF32, AMD's multiply float32. C · B is computed anew for each head of a group: at 64
tokens it is a third of the products, and costs no memory. `ssd_backward` has the gradients.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, clamp, step_size
from simba_compile.kernels.gpu.scan import strides, token_at

CHUNK = 64  # tokens: the products within a chunk grow with it, the states between chunks become fewer
BLOCK = 64  # of a head's channels, and of its states, at a time
FLOAT_CHUNK, FLOAT_BLOCK = 32, 32  # for float32, whose registers spill at 64
FLOAT_STATES, FLOAT_WARPS = 16, 4  # 32 states, or 8 warps for outputs, leave ptxas a stack of 8 bytes


@triton.jit
def steps(dt, bias, head, at, stride, A, inside, low, high, SOFTPLUS: tl.constexpr):
    """Δ of a chunk's tokens (0 past the end), and the logarithms to base 2 of their decays."""
    shift = None if bias is None else tl.load(bias + head).to(tl.float32)
    delta = step_size(tl.load(dt + at * stride), shift, SOFTPLUS)
    delta = clamp(delta, low, high)
    delta = tl.where(inside, delta, 0.0)
    return delta, delta * (tl.load(A + head).to(tl.float32) * LOG2E)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _states(
    x, x_batch, x_token, x_head, x_p, dt, dt_batch, dt_token, dt_head, A, B, B_batch, B_token, B_group, B_state, bias,
    index, index_batch, index_token, initial, held, last, tokens, chunks, heads, share, size, states, low, high,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a head's state before each chunk, to held[batch, chunk, head, p, n], and after all of them, to last.

    REVERSE: of its adjoint, with ∂y for x and C for B, after each chunk, and before all of them.
    """
    blocks_n, blocks_p = tl.cdiv(states, BLOCK_N), tl.cdiv(size, BLOCK_P)
    program = tl.program_id(0)
    p = program // blocks_n % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = program % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    head, batch = program // blocks_n // blocks_p % heads, (program // blocks_n // blocks_p // heads).to(tl.int64)
    x += batch * x_batch + head.to(tl.int64) * x_head
    B += batch * B_batch + (head // share).to(tl.int64) * B_group
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    if index is not None:
        index += batch * index_batch
    live, known = (p < size)[:, None], (n < states)[None, :]
    entry = p[:, None] * states + n[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if initial is not None:
        state += tl.load(initial + (batch * heads + head) * size * states + entry, mask=live & known, other=0.0)
    row = tl.arange(0, CHUNK)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        place = ((batch * chunks + chunk) * heads + head) * size * states
        tl.store(held + place + entry, state.to(held.dtype.element_ty), mask=live & known)
        at = token_at(index, index_token, chunk * CHUNK + row, tokens)
        inside = chunk * CHUNK + row < tokens
        delta, decay = steps(dt, bias, head, at, dt_token, A, inside, low, high, SOFTPLUS)
        total = tl.sum(decay, axis=0)
        since = tl.cumsum(decay, axis=0)
        weight = tl.where(inside, tl.exp2(since), 0.0) if REVERSE else delta * tl.exp2(total - since)
        u = tl.load(x + at[None, :] * x_token + p[:, None] * x_p, mask=live, other=0.0)
        b = tl.load(B + at[:, None] * B_token + n[None, :] * B_state, mask=known, other=0.0)
        b = (b.to(tl.float32) * weight[:, None]).to(u.dtype)
        state = tl.dot(u, b, state * tl.exp2(total), input_precision=PRECISION)
    tl.store(last + (batch * heads + head) * size * states + entry, state, mask=live & known)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _outputs(
    x, x_batch, x_token, x_head, x_p, dt, dt_batch, dt_token, dt_head, A, B, B_batch, B_token, B_group, B_state,
    C, C_batch, C_token, C_group, C_state, D, bias, index, index_batch, index_token, held, y,
    tokens, chunks, heads, share, size, states, low, high,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk and block of a head's channels."""
    blocks = tl.cdiv(size, BLOCK_P)
    program = tl.program_id(0)
    block, head, chunk = program % blocks, program // blocks % heads, program // blocks // heads % chunks
    batch = (program // blocks // heads // chunks).to(tl.int64)
    p, row = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, CHUNK)
    x += batch * x_batch + head.to(tl.int64) * x_head
    B += batch * B_batch + (head // share).to(tl.int64) * B_group
    C += batch * C_batch + (head // share).to(tl.int64) * C_group
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    if index is not None:
        index += batch * index_batch
    start, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)
    at = token_at(index, index_token, start + tl.arange(0, CHUNK), end)
    inside = start + row < end
    delta, decay = steps(dt, bias, head, at, dt_token, A, inside, low, high, SOFTPLUS)
    since = tl.cumsum(decay, axis=0)  # from the chunk's start
    live = p < size
    held += ((batch * chunks + chunk) * heads + head) * size * states

    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    carried = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = (n < states)[None, :]
        c = tl.load(C + at[:, None] * C_token + n[None, :] * C_state, mask=mask, other=0.0)
        b = tl.load(B + at[None, :] * B_token + n[:, None] * B_state, mask=(n < states)[:, None], other=0.0)
        products = tl.dot(c, b, products, input_precision=PRECISION)
        both = (n < states)[:, None] & live[None, :]
        state = tl.load(held + p[None, :] * states + n[:, None], mask=both, other=0.0)
        carried = tl.dot(c, state.to(c.dtype), carried, input_precision=PRECISION)
    between = tl.where(row[:, None] >= row[None, :], since[:, None] - since[None, :], float("-inf"))
    products *= tl.exp2(between) * delta[None, :]
    u = tl.load(x + at[:, None] * x_token + p[None, :] * x_p, mask=live[None, :], other=0.0)
    out = tl.dot(products.to(u.dtype), u, carried * tl.exp2(since)[:, None], input_precision=PRECISION)
    if D is not None:
        out += u.to(tl.float32) * tl.load(D + head).to(tl.float32)
    token = batch * tokens + start + row
    tl.store(y + (token[:, None] * heads + head) * size + p[None, :], out, mask=inside[:, None] & live[None, :])


def ssd_scan(
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
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.ssd.ssd_scan`."""
    batch, tokens, heads, size = x.shape
    groups, states = B.shape[2:]
    runtime.expect(
        dt=(dt, (batch, tokens, heads)), A=(A, (heads,)), B=(B, (batch, tokens, groups, states)), C=(C, tuple(B.shape)),
        D=(D, (heads,)), dt_bias=(dt_bias, (heads,)), initial=(initial, (batch, heads, size, states)),
    )  # fmt: skip
    runtime.expect_groups(groups, heads=heads)
    if index is not None:
        tokens = index.shape[1]
        runtime.expect(index=(index, (batch, tokens)))
    y = x.new_empty((batch, tokens, heads, size), dtype=torch.float32)
    if y.numel() == 0:
        none = x.new_zeros((batch, heads, size, states), dtype=torch.float32)
        return y, none if initial is None else none + initial
    A, D, dt_bias = A.contiguous(), runtime.flat(D), runtime.flat(dt_bias)
    held, last = chunk_states(x, dt, A, B, dt_bias, softplus, (dt_min, dt_max), initial, index, C.dtype)
    tile = tile_of(x, states)
    chunks = runtime.blocks_of(tokens, tile["CHUNK"])
    runtime.launch(
        _outputs, (batch * chunks * heads * runtime.blocks_of(size, tile["BLOCK_P"]),),
        x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(), C, *C.stride(), D, dt_bias, index, *strides(index, 2), held,
        y, tokens, chunks, heads, heads // groups, size, states, dt_min, dt_max, SOFTPLUS=softplus, **tile,
        num_warps=FLOAT_WARPS if x.dtype == torch.float32 else 8,
    )  # fmt: skip
    return y, last


def tile_of(x: Tensor, states: int) -> dict[str, Any]:
    """Tokens of a chunk, channels and states at a time, and how float32 is multiplied (halves are exact factors)."""
    chunk, widest, most = (FLOAT_CHUNK, FLOAT_BLOCK, FLOAT_STATES) if x.dtype == torch.float32 else (CHUNK, BLOCK, BLOCK)
    block_p = max(16, min(widest, runtime.power_of_two(x.shape[3])))
    block_n = max(16, min(most, runtime.power_of_two(states)))
    precision = "ieee" if torch.version.hip else "tf32x3"
    return {"CHUNK": chunk, "BLOCK_P": block_p, "BLOCK_N": block_n, "PRECISION": precision}


def chunk_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    limits: tuple[float, float],
    initial: Tensor | None,
    index: Tensor | None,
    dtype: torch.dtype,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (batch · chunk, head, p, n) in `dtype`, and the last one in float32.

    reverse: their gradients after each chunk, of x = ∂y and B = C, and that of the first; `initial` is that of the last.
    """
    batch, _, heads, size = x.shape
    tokens = dt.shape[1] if index is None else index.shape[1]
    groups, states = B.shape[2:]
    tile = tile_of(x, states)
    chunks = runtime.blocks_of(tokens, tile["CHUNK"])
    held = x.new_empty((batch * chunks, heads, size, states), dtype=dtype)
    last = x.new_empty((batch, heads, size, states), dtype=torch.float32)
    blocks = runtime.blocks_of(size, tile["BLOCK_P"]) * runtime.blocks_of(states, tile["BLOCK_N"])
    warps = 8 if dtype == x.dtype else 4  # a chain of chunks is the shorter, the more warps; for gradients of halves 8 spill
    runtime.launch(
        _states, (batch * heads * blocks,),
        x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(), dt_bias, index, *strides(index, 2),
        None if initial is None else initial.contiguous(), held, last,
        tokens, chunks, heads, heads // groups, size, states, *limits,
        REVERSE=reverse, SOFTPLUS=softplus, **tile, num_warps=warps,
    )  # fmt: skip
    return held, last

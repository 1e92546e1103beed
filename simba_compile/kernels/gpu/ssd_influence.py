"""The influence of each token on the last output of an SSD scan (`simba_compile.kernels.ops.ssd.ssd_influence`).

A is one number for each head, so ``log |Δy_T(t)[h, p]| = A_h S_t[h] + log|x_t[h, p] Δ_t[h] (C_T · B_t)|``: one logarithm
for a head, and a pool over its channels. What is left is reading x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import influence, runtime
from simba_compile.kernels.gpu.elementary import LN2, clamp, step_size

BLOCK_T = 16  # tokens at a time


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _products(
    B, B_batch, B_token, B_group, B_state, C, C_batch, C_group, C_state, products, tokens, groups, states, spans,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """products[b, t, g] = C_T · B_t."""
    program = tl.program_id(0)
    group, span, batch = program % groups, program // groups % spans, (program // groups // spans).to(tl.int64)
    t = (span * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    valid = (t < tokens)[:, None] & (n < states)[None, :]
    b = tl.load(B + batch * B_batch + t[:, None] * B_token + group * B_group + n[None, :] * B_state, mask=valid, other=0.0)
    c = tl.load(C + batch * C_batch + group * C_group + n * C_state, mask=n < states, other=0.0)
    product = tl.sum(b.to(tl.float32) * c.to(tl.float32)[None, :], 1)
    tl.store(products + (batch * tokens + t) * groups + group, product, mask=t < tokens)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _head_scores(
    x, x_batch, x_token, x_head, x_channel, dt, dt_batch, dt_token, dt_head, A, dt_bias, products, later, partial,
    tokens, heads, channels, groups, chunks, low, high,
    POOL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS_IN_DECAY: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial[b, h, t]: the pool over one head's channels, for the tokens of one chunk."""
    program = tl.program_id(0)
    head, chunk, batch = program % heads, program // heads % chunks, (program // heads // chunks).to(tl.int64)
    x += batch * x_batch + head.to(tl.int64) * x_head
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    a = tl.load(A + head).to(tl.float64)
    bias = None if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    carry = tl.zeros([], tl.float64)
    if chunk + 1 < chunks:
        carry = tl.load(later + (batch * chunks + chunk + 1) * heads + head)
    group = head // (heads // groups)
    p = tl.arange(0, BLOCK_P)
    for i in range(CHUNK // BLOCK_T):
        t = (chunk * CHUNK + CHUNK - (i + 1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        here, follows = t < tokens, t + 1 < tokens
        delta = step_size(tl.load(dt + t * dt_token, mask=here, other=0.0), bias, SOFTPLUS)
        delta = clamp(delta, low, high)
        decay = step_size(
            tl.load(dt + (t + 1) * dt_token, mask=follows, other=0.0), bias if BIAS_IN_DECAY else None, SOFTPLUS
        )
        decay = tl.where(follows, clamp(decay, low, high), 0.0).to(tl.float64)
        shift = a * (carry + tl.cumsum(decay, 0, reverse=True))
        weight = delta * tl.load(products + (batch * tokens + t) * groups + group, mask=here, other=0.0)
        valid = here[:, None] & (p < channels)[None, :]
        u = tl.load(x + t[:, None] * x_token + p[None, :] * x_channel, mask=valid, other=0.0).to(tl.float32)
        value = u * weight[:, None]
        bad = tl.max(tl.where(value != value, 1.0, 0.0), 1)  # as integers they take a stack, with Triton 3.9
        size = tl.where(value > 0, value, 0.0) if POOL == "max" else tl.abs(value)
        pooled = tl.max(size, 1)
        log = tl.log2(pooled) * LN2
        if POOL == "l2":
            origin = tl.where((pooled == 0) | (pooled == float("inf")), 1.0, pooled)
            share = value / origin[:, None]  # squares of small values would be 0
            log = (tl.log2(origin) + 0.5 * tl.log2(tl.sum(share * share, 1))) * LN2
        score = shift + tl.where(bad == 1, float("nan"), log).to(tl.float64)
        tl.store(partial + (batch * heads + head) * tokens + t, score, mask=here)
        carry += tl.sum(decay, 0)


def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    pool: str,
    bias_in_decay: bool,
) -> Tensor:
    """See `simba_compile.kernels.ops.ssd.ssd_influence`."""
    (batch, tokens, heads, channels), (groups, states) = x.shape, B.shape[2:]
    runtime.expect(
        dt=(dt, (batch, tokens, heads)), A=(A, (heads,)), B=(B, (batch, tokens, groups, states)),
        C=(C, (batch, tokens, groups, states)), dt_bias=(dt_bias, (heads,)),
    )  # fmt: skip
    runtime.expect_groups(groups, heads=heads)
    if x.numel() == 0:
        return x.new_full((batch, tokens), -torch.inf, dtype=torch.float64)
    later = influence.suffix_sums(dt, dt_bias if bias_in_decay else None, softplus, influence.CHUNK, (dt_min, dt_max))
    chunks, last = runtime.blocks_of(tokens, influence.CHUNK), C[:, -1]
    products = x.new_empty((batch, tokens, groups), dtype=torch.float32)
    spans, width = runtime.blocks_of(tokens, BLOCK_T), runtime.power_of_two(states)
    runtime.launch(
        _products, (batch * spans * groups,), B, *B.stride(), last, *last.stride(), products, tokens, groups, states, spans,
        BLOCK_T=BLOCK_T, BLOCK_N=width, num_warps=max(1, min(4, BLOCK_T * width // 32)),
    )  # fmt: skip
    partial = x.new_empty((batch, heads, tokens), dtype=torch.float64)
    runtime.launch(
        _head_scores, (batch * chunks * heads,), x, *x.stride(), dt, *dt.stride(), runtime.flat(A), runtime.flat(dt_bias),
        products, later, partial, tokens, heads, channels, groups, chunks, dt_min, dt_max,
        POOL=pool, SOFTPLUS=softplus, BIAS_IN_DECAY=bias_in_decay,
        CHUNK=influence.CHUNK, BLOCK_T=min(BLOCK_T, influence.CHUNK), BLOCK_P=runtime.power_of_two(channels), num_warps=1,
    )  # fmt: skip
    return torch.logsumexp(2 * partial, 1) / 2 if pool == "l2" else partial.amax(1)

"""The causal depthwise convolution with its activation, its gradients, and one step of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import sigmoid, silu

BLOCK_T, BLOCK_C = 32, 64  # a tile's halo of width - 1 tokens is small beside it, and comes from the first-level cache
TILES = 4  # that a program of the forward pass takes one after the other: loading the weights takes as long as one of them


@triton.jit
def _tile(program, blocks, spans, SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """(batch, first BLOCK_T tokens of the span, channels) of a program: channels run fastest."""
    block, span, batch = program % blocks, program // blocks % spans, (program // blocks // spans).to(tl.int64)
    t = (span * SPAN + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    return batch, t, c


@triton.jit
def _weights(weight, weight_channel, weight_width, bias, c, inside, WIDTH: tl.constexpr):
    """The channels' weights in float32, a row for each place in the window, and after them their bias."""
    rows = ()
    for k in tl.static_range(WIDTH):
        row = tl.load(weight + c * weight_channel + k * weight_width, mask=inside, other=0.0)
        rows = rows + (row.to(tl.float32)[None, :],)
    fixed = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        fixed += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return rows + (fixed[None, :],)


@triton.jit
def _sum_over_window(x, x_token, t, weights, valid, WIDTH: tl.constexpr):
    """bias + Σ_k weight_k x_{t − WIDTH + 1 + k} in float32; `x` points at the channels."""
    total = tl.broadcast_to(weights[WIDTH], valid.shape)
    for k in tl.static_range(WIDTH):
        at = t - (WIDTH - 1 - k)
        value = tl.load(x + at * x_token, mask=valid & (at >= 0), other=0.0).to(tl.float32)
        total = tl.fma(value, tl.broadcast_to(weights[k], valid.shape), total)
    return total


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _conv(
    x, x_batch, x_token, x_channel, weight, weight_channel, weight_width, bias, out,
    tokens, channels, spans, blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, t, c = _tile(tl.program_id(0), blocks, spans, TILES * BLOCK_T, BLOCK_T, BLOCK_C)
    inside = c < channels
    weights = _weights(weight, weight_channel, weight_width, bias, c, inside, WIDTH)
    x += batch * x_batch + c[None, :] * x_channel
    for _ in range(TILES):
        valid = (t < tokens) & inside[None, :]
        y = _sum_over_window(x, x_token, t, weights, valid, WIDTH)
        if SILU:
            y = silu(y)
        tl.store(out + (batch * tokens + t) * channels + c[None, :], y, mask=valid)
        t += BLOCK_T


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _conv_through_silu(
    grad, grad_batch, grad_token, grad_channel, x, x_batch, x_token, x_channel,
    weight, weight_channel, weight_width, bias, inner, dweight, dbias,
    tokens, channels, spans, blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """inner: the gradient before the activation; dweight[span, c, k] and dbias[span, c]: one tile's part of theirs."""
    batch, t, c = _tile(tl.program_id(0), blocks, spans, BLOCK_T, BLOCK_T, BLOCK_C)
    inside = c < channels
    valid = (t < tokens) & inside[None, :]
    x += batch * x_batch + c[None, :] * x_channel
    g = tl.load(grad + batch * grad_batch + t * grad_token + c[None, :] * grad_channel, mask=valid, other=0.0).to(tl.float32)
    if SILU:
        weights = _weights(weight, weight_channel, weight_width, bias, c, inside, WIDTH)
        y = _sum_over_window(x, x_token, t, weights, valid, WIDTH)
        s = sigmoid(y)
        g *= s + y * s * (1.0 - s)
    tl.store(inner + (batch * tokens + t) * channels + c[None, :], g, mask=valid)
    row = (tl.program_id(0) // blocks).to(tl.int64) * channels + c
    for k in tl.static_range(WIDTH):
        at = t - (WIDTH - 1 - k)
        value = tl.load(x + at * x_token, mask=valid & (at >= 0), other=0.0).to(tl.float32)
        tl.store(dweight + row * WIDTH + k, tl.sum(g * value, 0), mask=inside)
    if dbias is not None:
        tl.store(dbias + row, tl.sum(g, 0), mask=inside)


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _conv_to_input(
    inner, weight, weight_channel, weight_width, dx, tokens, channels, spans, blocks,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx_t = Σ_k weight_k inner_{t + WIDTH − 1 − k}."""
    batch, t, c = _tile(tl.program_id(0), blocks, spans, BLOCK_T, BLOCK_T, BLOCK_C)
    inside = c < channels
    weights = _weights(weight, weight_channel, weight_width, None, c, inside, WIDTH)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(WIDTH):
        at = t + (WIDTH - 1 - k)
        value = tl.load(
            inner + (batch * tokens + at) * channels + c[None, :], mask=(at < tokens) & inside[None, :], other=0.0
        )
        total += value * weights[k]
    tl.store(dx + (batch * tokens + t) * channels + c[None, :], total, mask=(t < tokens) & inside[None, :])


@triton.jit
def _conv_step(
    state, state_batch, state_channel, state_width, x, x_batch, x_channel, weight, weight_channel, weight_width, bias, out,
    channels, blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < channels
    state += batch * state_batch + c * state_channel
    weight += c * weight_channel
    y = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    window = ()
    for k in tl.static_range(WIDTH - 1):
        window = window + (tl.load(state + (k + 1) * state_width, mask=inside, other=0.0),)
    window = window + (tl.load(x + batch * x_batch + c * x_channel, mask=inside, other=0.0).to(state.dtype.element_ty),)
    tl.debug_barrier()  # no warp overwrites an entry before each has read it
    for k in tl.static_range(WIDTH):
        tl.store(state + k * state_width, window[k], mask=inside)
        y += window[k].to(tl.float32) * tl.load(weight + k * weight_width, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    tl.store(out + batch * channels + c, y, mask=inside)


def _grid(x: Tensor, span: int) -> tuple[int, int]:
    """Spans of tokens and blocks of channels that cover x."""
    return runtime.blocks_of(x.shape[1], span), runtime.blocks_of(x.shape[2], BLOCK_C)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.causal_conv1d`."""
    runtime.expect(weight=(weight, (x.shape[2], weight.shape[1])), bias=(bias, (x.shape[2],)))
    out = x.new_empty(x.shape)
    if x.numel():
        spans, blocks = _grid(x, TILES * BLOCK_T)
        runtime.launch(
            _conv, (x.shape[0] * spans * blocks,), x, *x.stride(), weight, *weight.stride(), runtime.flat(bias), out,
            x.shape[1], x.shape[2], spans, blocks,
            SILU=silu, WIDTH=weight.shape[1], TILES=TILES, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return out


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `simba_compile.kernels.ops.conv.causal_conv1d_backward`."""
    (batch, tokens, channels), width = x.shape, weight.shape[1]
    runtime.expect(grad=(grad, (batch, tokens, channels)), weight=(weight, (channels, width)), bias=(bias, (channels,)))
    dx = x.new_empty(x.shape)
    spans, blocks = _grid(x, BLOCK_T)
    dweight = x.new_empty((batch * spans, channels, width), dtype=torch.float32)
    dbias = x.new_empty((batch * spans, channels if bias is not None else 0), dtype=torch.float32)
    if x.numel():
        inner = x.new_empty(x.shape, dtype=torch.float32)
        grid, sizes = (batch * spans * blocks,), (tokens, channels, spans, blocks)
        constants = {"WIDTH": width, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": 4}
        runtime.launch(
            _conv_through_silu, grid, grad, *grad.stride(), x, *x.stride(), weight, *weight.stride(), runtime.flat(bias),
            inner, dweight, None if bias is None else dbias, *sizes, SILU=silu, **constants,
        )  # fmt: skip
        runtime.launch(_conv_to_input, grid, inner, weight, *weight.stride(), dx, *sizes, **constants)
    return dx, dweight.sum(0), dbias.sum(0)


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.conv_update`."""
    (batch, channels), width = x.shape, weight.shape[1]
    runtime.expect(
        state=(state, (batch, channels, width)), weight=(weight, (channels, width)), bias=(bias, (channels,))
    )  # fmt: skip
    out = x.new_empty(x.shape)
    if x.numel():
        block = 128  # small: one step is short, and spreads over as many processors as it can
        blocks = runtime.blocks_of(channels, block)
        runtime.launch(
            _conv_step, (batch * blocks,), state, *state.stride(), x, *x.stride(), weight, *weight.stride(),
            runtime.flat(bias), out, channels, blocks, SILU=silu, WIDTH=width, BLOCK_C=block, num_warps=4,
        )  # fmt: skip
    return out

"""One step of the selective scan (`simba_compile.kernels.ops.scan.state_update`)."""

import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, silu, step_size


@triton.jit
def _state_step(
    state, state_batch, state_channel, state_state, x, x_batch, x_channel, dt, dt_batch, dt_column,
    dt_proj, dt_proj_channel, dt_proj_column, A, A_channel, A_state,
    B, B_batch, B_state, C, C_batch, C_state, D, z, z_batch, z_channel, dt_bias, out,
    channels, states, rank, blocks,
    LOG_OF_A: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One step, where columns of `dt` are channels or, with `dt_proj`, its rank; with `LOG_OF_A`, A comes as ``log(-A)``."""
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    inside = c < channels
    valid = inside[:, None] & (n < states)
    at = state + batch * state_batch + c[:, None] * state_channel + n * state_state
    h = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    a = tl.load(A + c[:, None] * A_channel + n * A_state, mask=valid, other=0.0).to(tl.float32)
    if LOG_OF_A:
        a = -tl.exp2(a * LOG2E)
    b = tl.load(B + batch * B_batch + n * B_state, mask=n < states, other=0.0).to(tl.float32)
    read = tl.load(C + batch * C_batch + n * C_state, mask=n < states, other=0.0).to(tl.float32)
    u = tl.load(x + batch * x_batch + c * x_channel, mask=inside, other=0.0).to(tl.float32)
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)
    if dt_proj is None:
        step = tl.load(dt + batch * dt_batch + c * dt_column, mask=inside, other=0.0)
    else:
        # Row by row, whose sums are scalars: a tile would be laid out anew for its sum, or for what uses that.
        r = tl.arange(0, BLOCK_R)
        low = tl.load(dt + batch * dt_batch + r * dt_column, mask=r < rank, other=0.0).to(tl.float32)
        step = tl.zeros([BLOCK_C], tl.float32)
        for i in tl.static_range(BLOCK_C):
            channel = (block * BLOCK_C + i).to(tl.int64)
            within = r < tl.where(channel < channels, rank, 0)
            row = tl.load(dt_proj + channel * dt_proj_channel + r * dt_proj_column, mask=within, other=0.0)
            step = tl.where(tl.arange(0, BLOCK_C) == i, tl.sum(row.to(tl.float32) * low), step)
    delta = step_size(step, bias, SOFTPLUS)
    h = tl.exp2(delta[:, None] * a * LOG2E) * h + (delta * u)[:, None] * b
    tl.store(at, h, mask=valid)
    y = tl.sum(h * read, 1)
    if D is not None:
        y += u * tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        y *= silu(tl.load(z + batch * z_batch + c * z_channel, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + batch * channels + c, y, mask=inside)


def can_project(states: int, rank: int) -> bool:
    """Whether a warp, which has the fewer channels the more states they have, holds its rows of dt_proj in registers."""
    return states >= 16 and rank <= 256


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_proj: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    log_of_A: bool,
) -> Tensor:
    """`simba_compile.kernels.ops.scan.state_update`, which may project Δ itself.

    Parameters
    ----------
    dt_proj : Tensor, optional
        (channel, rank), where `can_project`: makes the steps of `dt`, which then is (batch, rank).
    """
    (batch, channels), states = x.shape, A.shape[1]
    rank = 1 if dt_proj is None else dt_proj.shape[1]
    runtime.expect(
        state=(state, (batch, channels, states)), dt=(dt, (batch, channels if dt_proj is None else rank)),
        dt_proj=(dt_proj, (channels, rank)), A=(A, (channels, states)), B=(B, (batch, states)), C=(C, (batch, states)),
        D=(D, (channels,)), z=(z, (batch, channels)), dt_bias=(dt_bias, (channels,)),
    )  # fmt: skip
    out = x.new_empty(x.shape)
    if x.numel():
        # Four numbers of state for a lane: so little that one sequence is spread over many processors. A warp alone sums up
        # its rows of dt_proj without waiting for others.
        warps, width = 4 if dt_proj is None else 1, runtime.power_of_two(states)
        block = max(2, 128 * warps // width)
        blocks = runtime.blocks_of(channels, block)
        runtime.launch(
            _state_step, (batch * blocks,), state, *state.stride(), x, *x.stride(), dt, *dt.stride(),
            dt_proj, *((0, 0) if dt_proj is None else dt_proj.stride()), A, *A.stride(), B, *B.stride(), C, *C.stride(),
            runtime.flat(D), z, *((0, 0) if z is None else z.stride()), runtime.flat(dt_bias), out,
            channels, states, rank, blocks,
            LOG_OF_A=log_of_A, SOFTPLUS=softplus, BLOCK_C=block, BLOCK_N=width,
            BLOCK_R=runtime.power_of_two(rank), num_warps=warps,
        )  # fmt: skip
    return out


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    log_of_A: bool = False,
) -> Tensor:
    """See `simba_compile.kernels.ops.scan.state_update`."""
    return update(state, x, dt, None, A, B, C, D, z, dt_bias, softplus, log_of_A)

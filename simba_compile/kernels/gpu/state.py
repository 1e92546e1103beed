"""One step of the selective scan (`simba_compile.kernels.ops.scan.state_update`)."""

import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, silu, step_size


@triton.jit
def _state_step(
    state, state_batch, state_channel, state_state, x, x_batch, x_channel, dt, dt_batch, dt_channel, A, A_channel, A_state,
    B, B_batch, B_state, C, C_batch, C_state, D, z, z_batch, z_channel, dt_bias, out,
    channels, states, blocks,
    SOFTPLUS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    inside = c < channels
    valid = inside[:, None] & (n < states)
    bias = None if dt_bias is None else tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)
    delta = step_size(tl.load(dt + batch * dt_batch + c * dt_channel, mask=inside, other=0.0), bias, SOFTPLUS)
    u = tl.load(x + batch * x_batch + c * x_channel, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(A + c[:, None] * A_channel + n * A_state, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_batch + n * B_state, mask=n < states, other=0.0).to(tl.float32)
    read = tl.load(C + batch * C_batch + n * C_state, mask=n < states, other=0.0).to(tl.float32)
    at = state + batch * state_batch + c[:, None] * state_channel + n * state_state
    h = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    h = tl.exp2(delta[:, None] * a * LOG2E) * h + (delta * u)[:, None] * b
    tl.store(at, h, mask=valid)
    y = tl.sum(h * read, 1)
    if D is not None:
        y += u * tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        y *= silu(tl.load(z + batch * z_batch + c * z_channel, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + batch * channels + c, y, mask=inside)


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
) -> Tensor:
    """See `simba_compile.kernels.ops.scan.state_update`."""
    (batch, channels), states = x.shape, A.shape[1]
    runtime.expect(
        state=(state, (batch, channels, states)), dt=(dt, (batch, channels)), A=(A, (channels, states)),
        B=(B, (batch, states)), C=(C, (batch, states)), D=(D, (channels,)), z=(z, (batch, channels)),
        dt_bias=(dt_bias, (channels,)),
    )  # fmt: skip
    out = x.new_empty(x.shape)
    if x.numel():
        # 512 numbers of state for each program: little enough that one sequence is spread over many processors.
        width = runtime.power_of_two(states)
        block = max(2, 512 // width)
        blocks = runtime.blocks_of(channels, block)
        runtime.launch(
            _state_step, (batch * blocks,), state, *state.stride(), x, *x.stride(), dt, *dt.stride(), A, *A.stride(),
            B, *B.stride(), C, *C.stride(), runtime.flat(D), z, *((0, 0) if z is None else z.stride()),
            runtime.flat(dt_bias), out, channels, states, blocks,
            SOFTPLUS=softplus, BLOCK_C=block, BLOCK_N=width, num_warps=4,
        )  # fmt: skip
    return out

"""One step of the scan of Mamba-2 (`simba_compile.kernels.ops.ssd.ssd_state_update`): its state is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.gpu.elementary import LOG2E, step_size


@triton.jit
def _ssd_step(
    state, state_batch, state_head, state_p, state_n, x, x_batch, x_head, x_p, dt, dt_batch, dt_head, A,
    B, B_batch, B_group, B_n, C, C_batch, C_group, C_n, D, dt_bias, out,
    heads, share, size, states, blocks,
    LOG_OF_A: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_P channels of one head; with `LOG_OF_A`, A comes as ``log(-A)``."""
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks % heads).to(tl.int64)
    batch = (program // blocks // heads).to(tl.int64)
    p, n = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    here, known = p < size, n < states
    both = here[:, None] & known[None, :]
    bias = None if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    delta = step_size(tl.load(dt + batch * dt_batch + head * dt_head), bias, SOFTPLUS)
    a = tl.load(A + head).to(tl.float32)
    if LOG_OF_A:
        a = -tl.exp2(a * LOG2E)
    decay = tl.exp2(delta * a * LOG2E)
    u = tl.load(x + batch * x_batch + head * x_head + p * x_p, mask=here, other=0.0).to(tl.float32)
    group = head // share
    b = tl.load(B + batch * B_batch + group * B_group + n * B_n, mask=known, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + group * C_group + n * C_n, mask=known, other=0.0).to(tl.float32)
    at = state + batch * state_batch + head * state_head + p[:, None] * state_p + n[None, :] * state_n
    h = tl.load(at, mask=both, other=0.0).to(tl.float32)
    h = decay * h + (delta * u)[:, None] * b[None, :]
    tl.store(at, h, mask=both)
    y = tl.sum(h * c[None, :], 1)
    if D is not None:
        y += u * tl.load(D + head).to(tl.float32)
    tl.store(out + (batch * heads + head) * size + p, y, mask=here)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    log_of_A: bool = False,
) -> Tensor:
    """See `simba_compile.kernels.ops.ssd.ssd_state_update`."""
    (batch, heads, size), (groups, states) = x.shape, B.shape[1:]
    runtime.expect(
        state=(state, (batch, heads, size, states)), dt=(dt, (batch, heads)), A=(A, (heads,)),
        B=(B, (batch, groups, states)), C=(C, (batch, groups, states)), D=(D, (heads,)), dt_bias=(dt_bias, (heads,)),
    )  # fmt: skip
    runtime.expect_groups(groups, heads=heads)
    out = x.new_empty(x.shape)
    if x.numel():
        # 1024 numbers of state for each program, two loads of 16 bytes a thread: a sequence of mamba2-2.7b has 640 of them.
        width = runtime.power_of_two(states)
        block = min(runtime.power_of_two(size), max(2, 1024 // width))
        blocks = runtime.blocks_of(size, block)
        lanes = 64 if torch.version.hip else 32  # of a warp
        warps = max(1, min(4, block * width // lanes))  # a spare one would read what another has updated in place
        runtime.launch(
            _ssd_step, (batch * heads * blocks,), state, *state.stride(), x, *x.stride(), dt, *dt.stride(), runtime.flat(A),
            B, *B.stride(), C, *C.stride(), runtime.flat(D), runtime.flat(dt_bias), out,
            heads, heads // groups, size, states, blocks,
            LOG_OF_A=log_of_A, SOFTPLUS=softplus, BLOCK_P=block, BLOCK_N=width, num_warps=warps,
        )  # fmt: skip
    return out

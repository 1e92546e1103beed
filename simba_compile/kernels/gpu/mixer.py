"""One token through a mixer (`simba_compile.kernels.ops.mixer`): three launches, or four, of those of its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.gpu import conv, norm, runtime, ssd_state
from simba_compile.kernels.gpu.state import can_project, update

FEW = 8  # sequences: each reads dt_proj anew, most of them from the cache, in less time than a launch takes


def mixer_update(
    state: Tensor,
    window: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
) -> Tensor:
    """See `simba_compile.kernels.ops.mixer.mixer_update`."""
    (batch, channels, states), rank = state.shape, dt_proj.shape[1]
    rows = projected.reshape(-1, projected.shape[-1])
    # The window is written before `update` looks at its own: what is wrong there is refused here.
    runtime.expect(
        projected=(rows, (batch, 2 * channels)), x_proj=(x_proj, (rank + 2 * states, channels)),
        dt_proj=(dt_proj, (channels, rank)), dt_bias=(dt_bias, (channels,)), A_log=(A_log, (channels, states)),
        D=(D, (channels,)),
    )  # fmt: skip
    x, z = rows.chunk(2, -1)
    u = conv.conv_update(window, x, conv_weight, conv_bias, True)
    with torch._C._DisableAutocast():  # as `ops.dispatch.by_torch` has it
        dt, B, C = F.linear(u, x_proj).split([rank, states, states], -1)
        if isinstance(batch, int) and batch <= FEW and can_project(states, rank):
            step, weight = dt, dt_proj
        else:
            step, weight = F.linear(dt, dt_proj), None
    y = update(state, u, step, weight, A_log, B, C, D, z, dt_bias, softplus=True, log_of_A=True)
    return y.view(*projected.shape[:-1], channels)


def ssd_mixer_update(
    state: Tensor,
    window: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    norm_groups: int,
) -> Tensor:
    """See `simba_compile.kernels.ops.mixer.ssd_mixer_update`."""
    (batch, heads, size, states), mixed = state.shape, window.shape[1]
    inner = heads * size
    groups = (mixed - inner) // (2 * states)
    rows = projected.reshape(-1, projected.shape[-1])
    # The window is written before the others look at their own: what is wrong there is refused here.
    runtime.expect(
        window=(window, (batch, inner + 2 * groups * states, window.shape[2])), dt_bias=(dt_bias, (heads,)),
        projected=(rows, (batch, inner + mixed + heads)), A_log=(A_log, (heads,)), D=(D, (heads,)),
        norm_weight=(norm_weight, (inner,)),
    )  # fmt: skip
    runtime.expect_groups(groups, heads=heads)
    if norm_groups:
        runtime.expect_groups(norm_groups, channels=inner)
    gate, entering, dt = rows.split([inner, mixed, heads], -1)
    u = conv.conv_update(window, entering, conv_weight, conv_bias, True)
    x, B, C = u.split([inner, groups * states, groups * states], -1)
    x, B, C = x.unflatten(-1, (heads, size)), B.unflatten(-1, (groups, states)), C.unflatten(-1, (groups, states))
    y = ssd_state.ssd_state_update(state, x, dt, A_log, B, C, D, dt_bias, softplus=True, log_of_A=True).flatten(-2)
    if norm_groups:
        y = norm.gated_norm(y, gate, norm_weight, eps, norm_groups)
    return y.view(*projected.shape[:-1], inner)

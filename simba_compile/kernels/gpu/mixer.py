"""One token through a Mamba-1 mixer (`simba_compile.kernels.ops.mixer.mixer_update`): three launches, or four."""

import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.gpu import conv, runtime
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
    dt, B, C = F.linear(u, x_proj).split([rank, states, states], -1)
    if isinstance(batch, int) and batch <= FEW and can_project(states, rank):
        step, weight = dt, dt_proj
    else:
        step, weight = F.linear(dt, dt_proj), None
    y = update(state, u, step, weight, A_log, B, C, D, z, dt_bias, softplus=True, log_of_A=True)
    return y.view(*projected.shape[:-1], channels)

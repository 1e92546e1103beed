"""One token through a whole mixer."""

import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.conv import conv_update
from simba_compile.kernels.reference.norm import gated_norm
from simba_compile.kernels.reference.scan import state_update
from simba_compile.kernels.reference.ssd import ssd_state_update


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
    x, z = projected.reshape(-1, projected.shape[-1]).chunk(2, -1)
    u = conv_update(window, x, conv_weight, conv_bias)
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], state.shape[2], state.shape[2]], -1)
    y = state_update(state, u, F.linear(dt, dt_proj), A_log, B, C, D, z, dt_bias, log_of_A=True)
    return y.reshape(*projected.shape[:-1], y.shape[-1])


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
    heads, size, states = state.shape[1:]
    inner = heads * size
    gate, entering, dt = projected.reshape(-1, projected.shape[-1]).split([inner, window.shape[1], heads], -1)
    between = (window.shape[1] - inner) // 2
    x, B, C = conv_update(window, entering, conv_weight, conv_bias).split([inner, between, between], -1)
    B, C = B.unflatten(-1, (-1, states)), C.unflatten(-1, (-1, states))
    y = ssd_state_update(state, x.unflatten(-1, (heads, size)), dt, A_log, B, C, D, dt_bias, log_of_A=True).flatten(-2)
    if norm_groups:
        y = gated_norm(y, gate, norm_weight, eps, norm_groups)
    return y.reshape(*projected.shape[:-1], inner)

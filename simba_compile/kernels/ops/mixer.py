"""One token through a whole mixer, but for its outer projections: what a decoding step calls once a layer."""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.ops.dispatch import fake, implementation, operator
from simba_compile.kernels.ops.gradients import undifferentiable


@operator(
    "(Tensor(a!) state, Tensor(b!) window, Tensor projected, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, "
    "Tensor dt_proj, Tensor? dt_bias, Tensor A_log, Tensor? D) -> Tensor"
)
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
    """One token through a Mamba-1 mixer, from the output of in_proj to the input of out_proj.

    `conv_update`, the projection of its output to Δ's rank, B and C, the projection of the rank to Δ, and `state_update`
    with ``A = -exp(A_log)``, SiLU after the convolution, softplus and the gate.

    Parameters
    ----------
    state : Tensor
        (batch, channel, state), updated in place.
    window : Tensor
        (batch, channel, width): the convolution's last inputs, shifted in place.
    projected : Tensor
        (batch, ..., 2 * channel), one token for each sequence: the convolution's input and, behind it, the gate.
    conv_weight : Tensor
        (channel, width).
    conv_bias, dt_bias, D : Tensor, optional
        (channel).
    x_proj : Tensor
        (rank + 2 * state, channel), in the dtype of `projected`: the weight that makes Δ's rank, B and C.
    dt_proj : Tensor
        (channel, rank), in the dtype of `projected`: the weight that makes Δ.
    A_log : Tensor
        (channel, state): the logarithm of -A.

    Returns
    -------
    Tensor
        (batch, ..., channel), contiguous.
    """
    given = (projected, state, window, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
    run = implementation("mixer_update", *given)
    return run(state, window, projected, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)


@fake("mixer_update")
def _(state: Tensor, window: Tensor, projected: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(projected[..., : state.shape[1]], memory_format=torch.contiguous_format)


undifferentiable("mixer_update")


@operator(
    "(Tensor(a!) state, Tensor(b!) window, Tensor projected, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, "
    "Tensor A_log, Tensor? D, Tensor? norm_weight, float eps, SymInt norm_groups) -> Tensor"
)
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
    """One token through a Mamba-2 mixer, from the output of in_proj to the input of out_proj.

    `conv_update` with SiLU, `ssd_state_update` with ``A = -exp(A_log)`` and softplus, and `gated_norm`.

    Parameters
    ----------
    state : Tensor
        (batch, head, p, n), updated in place.
    window : Tensor
        (batch, head * p + 2 * group * n, width): the convolution's last inputs, shifted in place.
    projected : Tensor
        (batch, ..., 2 * head * p + 2 * group * n + head), one token for each sequence: the gate; the convolution's input,
        which is x and each group's B and C; and Δ.
    conv_weight : Tensor
        (head * p + 2 * group * n, width).
    conv_bias : Tensor, optional
        (head * p + 2 * group * n).
    dt_bias, D : Tensor, optional
        (head).
    A_log : Tensor
        (head): the logarithm of -A.
    norm_weight : Tensor, optional
        (head * p).
    eps : float
        What the norm adds to the mean of squares.
    norm_groups : int
        Groups of channels that are normed by themselves. 0: there is no norm, and the gate is not read.

    Returns
    -------
    Tensor
        (batch, ..., head * p), contiguous.
    """
    given = (projected, state, window, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    run = implementation("ssd_mixer_update", *given)
    return run(state, window, projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, norm_groups)


@fake("ssd_mixer_update")
def _(state: Tensor, window: Tensor, projected: Tensor, *_: Any) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], state.shape[1] * state.shape[2]))


undifferentiable("ssd_mixer_update")

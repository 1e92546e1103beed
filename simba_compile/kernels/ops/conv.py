"""The causal convolution in front of the scan: over a sequence, with its gradient, and for one token."""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.ops.dispatch import fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable, undifferentiable
from simba_compile.kernels.reference import compute_dtype


@operator("(Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor")
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The causal depthwise convolution in front of the scan: ``out_t = silu(bias + Σ_k weight_k x_{t − width + 1 + k})``.

    Parameters
    ----------
    x : Tensor
        (batch, token, channel).
    weight : Tensor
        (channel, width).
    bias : Tensor, optional
        (channel).
    silu : bool
        Whether SiLU follows.

    Returns
    -------
    Tensor
        (batch, token, channel), contiguous.
    """
    return implementation("causal_conv1d", x, weight, bias)(x, weight, bias, silu)


@fake("causal_conv1d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@operator("(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor, Tensor)")
def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `causal_conv1d` for x, weight and bias.

    Parameters
    ----------
    grad : Tensor
        (batch, token, channel): that of the output, in x's dtype.
    x, weight, bias, silu
        See `causal_conv1d`.

    Returns
    -------
    Tensor
        As `x`.
    Tensor, Tensor
        As `weight` and `bias`, in float32 (float64 for float64); the latter empty where there is no bias.
    """
    return implementation("causal_conv1d_backward", grad, x, weight, bias)(grad, x, weight, bias, silu)


@fake("causal_conv1d_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    kind = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=kind),
        x.new_empty(0 if bias is None else bias.shape, dtype=kind),
    )


undifferentiable("causal_conv1d_backward")


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.simba.causal_conv1d_backward(grad, x, weight, bias, ctx.silu)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None


differentiable("causal_conv1d", _conv_backward, _conv_setup)


@operator("(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor")
def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One step of `causal_conv1d`.

    Parameters
    ----------
    state : Tensor
        (batch, channel, width): the last inputs, shifted in place so that it ends with `x`.
    x : Tensor
        (batch, channel).
    weight : Tensor
        (channel, width).
    bias : Tensor, optional
        (channel).
    silu : bool
        Whether SiLU follows.

    Returns
    -------
    Tensor
        (batch, channel).
    """
    return implementation("conv_update", x, state, weight, bias)(state, x, weight, bias, silu)


@fake("conv_update")
def _(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


undifferentiable("conv_update")

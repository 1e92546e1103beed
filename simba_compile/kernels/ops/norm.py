"""The RMS norms: plain, with the gate of Mamba-2, and of a residual stream that a layer's output is added to."""

import math
from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.ops.dispatch import fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable
from simba_compile.kernels.reference import compute_dtype


@operator("(Tensor x, Tensor? weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over the last axis, computed in float32 or wider.

    Parameters
    ----------
    x : Tensor
        (..., channel).
    weight : Tensor, optional
        (channel).
    eps : float
        Is added to the mean of the squares.

    Returns
    -------
    Tensor
        As `x`.
    """
    return implementation("rms_norm", x, weight)(x, weight, eps)


@fake("rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _over_rows(value: Tensor) -> Tensor:
    """The sum over all axes but the last. By `reshape`: torch cannot batch `flatten` (``is_grads_batched=True``)."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1]).sum(0)


def _in_groups(value: Tensor, groups: int) -> Tensor:
    return value.reshape(*value.shape[:-1], groups, value.shape[-1] // groups)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    return *_through_norm(grad, x, weight, ctx.eps), None


def _through_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `rms_norm`, of groups of channels by themselves, with respect to x and the weight."""
    kind = compute_dtype(x.dtype)
    u, g = _in_groups(x.to(kind), groups), grad.to(kind)
    inverse = torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    normed = u * inverse
    dweight = None if weight is None else _over_rows(g * normed.reshape(x.shape)).to(weight.dtype)
    g = _in_groups(g if weight is None else g * weight.to(kind), groups)
    dx = (inverse * (g - normed * (g * normed).mean(-1, keepdim=True))).reshape(x.shape)
    return dx.to(x.dtype), dweight


differentiable("rms_norm", _norm_backward, _norm_setup)


@operator("(Tensor x, Tensor gate, Tensor? weight, float eps, SymInt groups, ScalarType? dtype=None) -> Tensor")
def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm after the scan of Mamba-2: `rms_norm` of ``x silu(gate)``, each of so many groups of channels by itself.

    Parameters
    ----------
    x, gate : Tensor
        (..., channel); they may differ in dtype.
    weight : Tensor, optional
        (channel).
    eps : float
        Is added to the mean of the squares.
    groups : int
        Divides the number of channels.
    dtype : torch.dtype, optional
        What the result is rounded to; none: as `x`.

    Returns
    -------
    Tensor
        As `x`, in `dtype`.
    """
    return implementation("gated_norm", x, gate, weight)(x, gate, weight, eps, groups, dtype)


@fake("gated_norm")
def _(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _gated_norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.groups, _ = inputs
    ctx.save_for_backward(*tensors)


def _gated_norm_backward(ctx: Any, grad: Tensor) -> tuple:
    x, gate, weight = ctx.saved_tensors
    kind = compute_dtype(x.dtype)
    u, z = x.to(kind), gate.to(kind)
    sigmoid = torch.sigmoid(z)
    dy, dweight = _through_norm(grad, u * z * sigmoid, weight, ctx.eps, ctx.groups)
    dgate = dy * u * (sigmoid + z * sigmoid * (1 - sigmoid))
    return (dy * z * sigmoid).to(x.dtype), dgate.to(gate.dtype), dweight, None, None, None


differentiable("gated_norm", _gated_norm_backward, _gated_norm_setup)


@operator("(Tensor residual, Tensor x, Tensor? weight, float eps, Tensor? index) -> (Tensor, Tensor)")
def add_norm(residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """A residual stream with a layer's output added, and the next layer's norm of it.

    Parameters
    ----------
    residual : Tensor
        (..., channel), in x's dtype, or in float32 beside halves.
    x : Tensor
        (..., channel).
    weight : Tensor, optional
        (channel).
    eps : float
        Is added to the mean of the squares.
    index : Tensor, optional
        (batch, kept) int64, no position twice: x is (batch, kept, channel), and of `residual`, (batch, token, channel),
        these tokens are taken.

    Returns
    -------
    Tensor
        ``residual + x``, in residual's dtype.
    Tensor
        `rms_norm` of it, after it is rounded to x's dtype.
    """
    return implementation("add_norm", residual, x, weight, index)(residual, x, weight, eps, index)


@fake("add_norm")
def _(residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=residual.dtype), x.new_empty(x.shape)


def _add_norm_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    residual, x, weight, ctx.eps, index = inputs
    ctx.save_for_backward(output[0], weight, index)
    ctx.stream, ctx.dtype = residual.shape, x.dtype


def _add_norm_backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple:
    total, weight, index = ctx.saved_tensors
    through, dweight = _through_norm(grad, total.to(ctx.dtype), weight, ctx.eps)
    dtotal = grad_total + through
    dresidual = dtotal
    if index is not None:
        dresidual = torch.ops.simba.scatter(dtotal.new_zeros(ctx.stream), index, dtotal, 1)
    return dresidual, dtotal.to(ctx.dtype), dweight, None, None


differentiable("add_norm", _add_norm_backward, _add_norm_setup)

"""The operator of linear layers, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.native import linear as native
from simba_compile.kernels.ops.dispatch import by_torch, fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable


@operator("(Tensor x, Tensor weight, Tensor? bias, Tensor? add, Tensor? index) -> Tensor")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, index: Tensor | None) -> Tensor:
    """``x weightᵀ + bias + add``: a linear layer, and the residual stream that its output is added to.

    Parameters
    ----------
    x : Tensor
        (..., depth).
    weight : Tensor
        (column, depth), in x's dtype.
    bias : Tensor, optional
        (column).
    add : Tensor, optional
        (..., column), in x's dtype.
    index : Tensor, optional
        (batch, kept) int64, no position twice: x is (batch, kept, depth), and of `add`, (batch, token, column), these tokens
        are added.

    Returns
    -------
    Tensor
        (..., column) in x's dtype, contiguous.
    """
    run = implementation("linear", x, weight, bias, add, index)
    if run is native.linear and native.is_faster(x, weight):
        return run(x, weight, bias, add, index)
    return _by_torch(x, weight, bias, add, index)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, index: Tensor | None) -> Tensor:
    """Torch's product, where that is faster than our kernel. Kept tokens are a copy, to which it is added in place."""
    if weight.dim() != 2 or bias is not None or add is not None or index is not None:  # torch refuses the rest
        _expect_to_fit(x, weight, bias, add, index)
    if add is None or index is None:
        return by_torch("linear")(x, weight, bias, add)
    kept = torch.ops.simba.gather(add, index, 1)
    kept.view(-1, weight.shape[0]).addmm_(x.reshape(-1, weight.shape[1]), weight.t())
    return kept if bias is None else kept.add_(bias.to(kept.dtype))


def _expect_to_fit(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, index: Tensor | None) -> None:
    """Refuse what our kernel does: torch would repeat a short bias and leave an index out."""
    columns = weight.shape[:1]
    shape = (*x.shape[:-1], *columns)
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1:] == x.shape[-1:] and weight.dtype == x.dtype
    fits = fits and (bias is None or bias.shape == columns)
    if index is None:
        fits = fits and (add is None or (add.shape == shape and add.dtype == x.dtype))
    else:
        fits = fits and add is not None and index.shape == shape[:2] and add.dtype == x.dtype
        fits = fits and add is not None and add.dim() == len(shape) == 3 and add.shape[::2] == (shape[0], shape[2])
    if not fits:
        given = {"x": x, "weight": weight, "bias": bias, "add": add, "index": index}
        told = ", ".join(f"{name} {tuple(value.shape)}, {value.dtype}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"linear was given {told}; expected x (..., depth), weight (column, depth), bias (column), add (..., column), "
            "or, with an index (batch, kept) of its tokens, add (batch, token, column); weight and add in x's dtype."
        )


@fake("linear")
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, add, index = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.bias = None if bias is None else bias.dtype
    ctx.add = None if add is None else add.shape


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, index = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    dx = grad @ weight if ctx.needs_input_grad[0] else None
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    dbias = None if ctx.bias is None else rows.sum(0).to(ctx.bias)
    dadd = None if ctx.add is None else grad
    if index is not None:
        dadd = torch.ops.simba.scatter(grad.new_zeros(ctx.add), index, grad, 1)
    return dx, dweight, dbias, dadd, None


differentiable("linear", _linear_backward, _linear_setup)

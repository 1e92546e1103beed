"""What autograd is told of an operator: its gradient, or that it has none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from simba_compile.kernels.ops.dispatch import LIBRARY, fake, operator


def differentiable(name: str, backward: Callable, setup: Callable) -> None:
    """Give the operator a gradient: `setup(ctx, inputs, output)` saves what `backward(ctx, *grads)` reads.

    The gradient has none itself: to ask for second derivatives raises, where they would be left out in silence.
    """

    def once(ctx: Any, *grads: Any) -> Any:
        spec: Any = None

        def flat(ctx: Any, *grads: Any) -> tuple:  # torch's function takes no lists of gradients
            nonlocal spec
            values, spec = tree_flatten(backward(ctx, *grads))
            return tuple(values)

        values = torch.autograd.function.once_differentiable(flat)(ctx, *grads)
        return tree_unflatten(values if isinstance(values, tuple) else (values,), spec)

    torch.library.register_autograd(f"simba::{name}", once, setup_context=setup, lib=LIBRARY)


def undifferentiable(name: str) -> None:
    """Let the operator raise where its gradient is asked for: torch would take it for zero, with a warning.

    What raises is an operator of its own, since AOTAutograd traces the backward pass of whatever might have one.
    """
    operation = getattr(torch.ops.simba, name).default

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.inputs = [(list(value.shape), value.dtype) if isinstance(value, Tensor) else None for value in args]
            with torch._C._AutoDispatchBelowAutograd():
                return operation(*args)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
            return tuple(given and torch.ops.simba.no_gradient(grad, given[0], name).to(given[1]) for given in ctx.inputs)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            return Refusing.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    LIBRARY.impl(name, run, "Autograd")


@operator("(Tensor grad, SymInt[] size, str operator) -> Tensor")
def no_gradient(grad: Tensor, size: list[int], operator: str) -> Tensor:
    """What stands in backward passes for the gradient of an operator that has none.

    Parameters
    ----------
    grad : Tensor
        Of the operator's result.
    size : list of int
        The shape of one of its inputs.
    operator : str
        Its name.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError(
        f"simba::{operator} has no gradient: scores and decoding steps have none. To train, give the model whole sequences."
    )


@fake("no_gradient")
def _(grad: Tensor, size: list[int], operator: str) -> Tensor:
    return grad.new_empty(size)

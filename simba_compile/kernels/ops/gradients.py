"""What autograd is told of an operator: its gradient, or that it has none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from simba_compile.kernels.ops.dispatch import LIBRARY, fake, operator, places_written


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

    So does what it writes into, from then on; but not where AOTAutograd traces it, for Inductor (torch 2.13) fails at copies
    of states of a symbolic batch. What raises is an operator of its own, since AOTAutograd traces backward passes, too.
    """
    operation = getattr(torch.ops.simba, name).default
    written = places_written(operation)

    class Refusing(torch.autograd.Function):
        """The results, and copies of some of the arguments, which were written into."""

        @staticmethod
        def forward(ctx: Any, copied: list[int], *args: Any) -> tuple:  # type: ignore[override]
            ctx.inputs = [(list(value.shape), value.dtype) if isinstance(value, Tensor) else None for value in args]
            with torch._C._AutoDispatchBelowAutograd():
                results = operation(*args)
                copies = [args[place].clone() for place in copied]
            return *(results if isinstance(results, tuple) else (results,)), *copies

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:  # type: ignore[override]
            refused = (given and torch.ops.simba.no_gradient(grad, given[0], name).to(given[1]) for given in ctx.inputs)
            return None, *refused

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled() or not any(isinstance(value, Tensor) and value.requires_grad for value in args):
            with torch._C._AutoDispatchBelowAutograd():
                return operation(*args)
        copied = [place for place in written if type(args[place]) is Tensor]
        results = Refusing.apply(copied, *args)
        count = len(results) - len(copied)
        for place, value in zip(copied, results[count:], strict=True):
            args[place].copy_(value)  # the numbers that it has: what autograd knows of it is another thing from here on
        return results[0] if count == 1 else results[:count]

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
        f"simba::{operator} has no gradient: scores, decoding steps and gradients have none. "
        "To train, give the model whole sequences."
    )


@fake("no_gradient")
def _(grad: Tensor, size: list[int], operator: str) -> Tensor:
    return grad.new_empty(size)

"""Writes in place that become ordinary operations, in what our backend compiles: random ones are in test_aliasing.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import HIDDEN, tokens


def compiled_and_not(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a function gives, compiled with symbolic sizes by our backend, and as it is."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="simba", dynamic=True, fullgraph=True)
    return fast(*inputs), function(*inputs)


@pytest.mark.parametrize("write", ["addcmul_", "addcdiv_", "lerp_"])
def test_a_write_of_three_operands_that_broadcasts(write: str) -> None:
    weight = torch.rand(HIDDEN) + 1
    one, other = compiled_and_not(lambda h: getattr(h.sin(), write)(h.cos(), weight).tanh(), tokens())
    torch.testing.assert_close(one, other)


class WritesThroughViews(torch.autograd.Function):
    """Its forward runs without gradients, and Dynamo records it within a graph that has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.pad(x, (0, 2))
        y[:, 0].add_(1.0)
        y[:, 1].mul_(2.0)
        return y[..., :4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_writes_through_views_in_an_autograd_function() -> None:
    """As in mambapy's parallel scan."""
    weight = torch.tensor(2.0, requires_grad=True)
    losses = compiled_and_not(lambda x, weight: WritesThroughViews.apply(x * weight).sum(), torch.ones(2, 5, 4), weight)
    grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*grads)

"""Functions that write in place, or take an unusual argument, give what they give in eager mode; their gradients, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import simba
from torch import Tensor, nn
from toys import HIDDEN, OPS, Captured, Toy, tokens

from simba_compile.options import Options
from simba_compile.passes import transform


def comparison(x: Tensor, w: Tensor) -> Tensor:
    """A float that says where, not a bool."""
    where = (x * 1.0).gt_(0.0)
    return x * (where + where)


def logical(x: Tensor, w: Tensor) -> Tensor:
    return x - (x * 1.0).logical_not_()


def activation(x: Tensor, w: Tensor) -> Tensor:
    return F.relu(F.linear(x, w), inplace=True) * x


def activation_of_biased(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w, w[0])
    return F.leaky_relu_(y) * x


def activation_of_stream(x: Tensor, w: Tensor) -> Tensor:
    return F.silu(x + F.linear(x, w), inplace=True)


def dropout(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    return F.dropout(y, 0.5, False, True) + y


def norm_with_alpha(x: Tensor, w: Tensor) -> Tensor:
    return w[0] * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.1, alpha=5.0)))


def convolution_in_half(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv1d(x.transpose(1, 2), w[:, None, :4], padding=3, groups=HIDDEN)[..., : x.shape[1]].transpose(1, 2)


FUNCTIONS = [comparison, logical, activation, activation_of_biased, activation_of_stream, dropout, norm_with_alpha]


@pytest.mark.parametrize("function", [*FUNCTIONS, convolution_in_half], ids=lambda function: function.__name__)
def test_as_eager(function: Callable) -> None:
    results = []
    for run in (function, simba(function, keep=1.0)):
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 5, HIDDEN), (HIDDEN, HIDDEN))]
        result = run(*given)
        result.float().square().sum().backward()
        results.append([result, *(value.grad for value in given)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


class OwnGate(Toy):
    """Its gate has a projection of its own and an activation that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, HIDDEN)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        gate = self.activation(self.gate(h))
        x, *_ = self.scanned(h)
        return h + x * gate

    def scanned(self, h: Tensor) -> tuple[Tensor, ...]:
        """All of the mixer but its gate, with tokens of the stream as x."""
        x = OPS.causal_conv1d(h, self.conv[:HIDDEN], None, True)
        return OPS.selective_scan(x, x, self.A[:HIDDEN], x[..., :3], x[..., 3:], None, None, None, True, None)


def test_gate_is_activated_once() -> None:
    """Of kept tokens it is computed behind the gather, or before, but not both."""
    torch.manual_seed(0)
    model, h = nn.Sequential(OwnGate()), tokens()
    captured = Captured(lambda h: model(h)[:, -1:], h)
    pruned = transform(captured.gm, Options(keep=0.5, schedule=(0.5,), min_tokens=1))
    assert pruned.pruned is not None and pruned.plan is not None
    applied = [node for node in pruned.pruned.graph.nodes if node.target is F.silu]
    assert len(applied) == 1 and not applied[0].kwargs.get("inplace")
    with torch.no_grad():
        everything = pruned.pruned(*captured.args, h.shape[1])
    torch.testing.assert_close(everything[0], captured.result)


def test_a_write_becomes_an_operation() -> None:
    """``inplace=True`` between mixers does not keep them dense."""
    model = nn.Sequential(Toy(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), Toy())
    captured = Captured(lambda h: model[3](h + model[1:3](model[0](h)))[:, -1:], tokens())
    made = transform(captured.gm, Options(keep=0.3, min_tokens=1))
    assert [mixer.reason for mixer in made.mixers] == [None, None]
    assert not any(node.kwargs.get("inplace") for node in made.dense.graph.nodes)

"""Functions that write in place, or take an unusual argument, give what they give in eager mode; their gradients, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_eager
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import HIDDEN, OPS, WIDTH, Captured, Toy, tokens

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


FUNCTIONS = [
    *(comparison, logical, activation, activation_of_biased, activation_of_stream, dropout),
    *(norm_with_alpha, convolution_in_half),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_as_eager(function: Callable) -> None:
    assert_as_eager(function, (2, 5, HIDDEN), (HIDDEN, HIDDEN))


class OwnGate(Toy):
    """Its gate has a projection of its own and an activation that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, HIDDEN)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        gate = self.activation(self.gate(h))
        x = OPS.causal_conv1d(h, self.conv[:HIDDEN], None, True)
        y, _ = OPS.selective_scan(x, x, self.A[:HIDDEN], x[..., :3], x[..., 3:], None, None, None, True, None)
        return h + y * gate


class OneBias(nn.Linear):
    """Adds one number to all channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias[:1])


def pruned_graph(layer: Toy, h: Tensor) -> GraphModule:
    """Of one layer that prunes, read at the end; with all tokens kept it gives what the layer gives."""
    captured = Captured(lambda h: layer(h)[:, -1:], h)
    pruned = transform(captured.gm, Options(keep=0.5, schedule=(0.5,), min_tokens=1)).pruned
    assert pruned is not None
    with torch.no_grad():
        torch.testing.assert_close(pruned(*captured.args, h.shape[1])[0], captured.result)
    return pruned


def test_gate_is_activated_once() -> None:
    """Of kept tokens it is computed behind the gather, or before, but not both."""
    torch.manual_seed(0)
    applied = [node for node in pruned_graph(OwnGate(), tokens()).graph.nodes if node.target is F.silu]
    assert len(applied) == 1 and not applied[0].kwargs.get("inplace")


def test_a_bias_of_one_number() -> None:
    """It has no rows for the gate."""
    torch.manual_seed(0)
    layer = Toy()
    layer.in_proj = OneBias(HIDDEN, 2 * WIDTH)
    pruned_graph(layer, tokens())


def test_a_write_becomes_an_operation() -> None:
    """``inplace=True`` between mixers does not keep them dense."""
    model = nn.Sequential(Toy(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), Toy())
    captured = Captured(lambda h: model[3](h + model[1:3](model[0](h)))[:, -1:], tokens())
    made = transform(captured.gm, Options(keep=0.3, min_tokens=1))
    assert [mixer.reason for mixer in made.mixers] == [None, None]
    assert not any(node.kwargs.get("inplace") for node in made.dense.graph.nodes)

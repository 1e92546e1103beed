"""What a model computes without gradients, or under autocast, in a region of its own: no pass moves it into another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_eager, have_products_of_torch
from torch import Tensor
from toys import normed

OPS = torch.ops.simba
SIZE = 6


def residual(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.linear(x, w)
    return x + y


def residual_within(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = F.linear(x, w)
    with torch.no_grad():
        z = x + y
    return y * z


def norm(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = normed(x)
    return v * y


def gated_norm(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = normed((x * F.silu(x + 1)).view(*x.shape[:2], 2, -1)).view(x.shape)
    return v * y


def norm_of_sum(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = x + x.sin()
    return v * normed(y) + y


def sum_of_norm(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = x + x.sin()
    with torch.no_grad():
        z = v * normed(y)
    return z + y


def transposes(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.transpose(1, 2)
    return y.transpose(1, 2) * v


def product_of_columns(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.transpose(1, 2)
    return (w @ y).transpose(1, 2)


def gathered_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.silu(x)
    return OPS.gather(y, torch.tensor([[0, 2], [1, 4]]), 1) * v


def scan(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Of gathered tokens, with a bias that is widened."""
    with torch.no_grad():
        y = OPS.gather(x, torch.tensor([[0, 2], [1, 4]]), 1)
        bias = v.bfloat16().float()
    return OPS.selective_scan(y, y, -w.exp(), y, y, v, None, bias, True, None)[0]


def convolution(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.conv1d(x.transpose(1, 2), w[:, None, :4], v, padding=3, groups=SIZE)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def write(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = F.silu(x)
    with torch.no_grad():
        y.clamp_(-0.1, 0.1)
    return y * v


def autocast_off(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = F.linear(x, w)
        return x + y


def autocast_on(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    half = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(half, w)
    return half + y


def written_product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x.flatten(0, 1) * 2
        y.addmm_(x.flatten(0, 1), w)
        return y * 3


REGIONS = [
    *(residual, residual_within, norm, gated_norm, norm_of_sum, sum_of_norm, transposes, product_of_columns),
    *(gathered_gate, scan, convolution, write),
    *(autocast_off, autocast_on, written_product),
]


@pytest.mark.parametrize("products", ["ours", "of torch"])
@pytest.mark.parametrize("function", REGIONS, ids=lambda function: function.__name__)
def test_regions(function: Callable, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if products == "of torch":
        have_products_of_torch(monkeypatch)
    assert_as_eager(function, (2, 5, SIZE), (SIZE, SIZE), (SIZE,))

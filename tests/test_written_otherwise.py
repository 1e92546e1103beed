"""What a model computes may be written in many ways: written in another, it prunes all the same, and to the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import HIDDEN, OPS, STATES, Captured, Toy, matrix, tokens, toys

from simba_compile import Options
from simba_compile.passes import transform

a, b, c = toys(3)
side = torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(1))
scale = nn.Parameter(torch.tensor(0.7))
square = torch.randn(20, 20, generator=torch.Generator().manual_seed(2)).tril()
TRIANGLE = torch.ones(64, 64).tril()
row = torch.arange(20) % 3 > 0

Ways = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]  # plainly, otherwise, inputs beside h


@torch.library.custom_op("tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    """The same values, by an operation that the passes do not know."""
    return x.clone()


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Otherwise(Toy):
    """A mixer with its first or its last product written in another way."""

    def __init__(self, like: Toy, **products: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        for name, value in [*like._parameters.items(), *like._modules.items()]:
            setattr(self, name, value)
        for name, product in products.items():
            linear = getattr(like, name)
            delattr(self, name)
            setattr(self, name, product(linear))


def attends(h: Tensor, mask: Tensor) -> Tensor:
    """To all tokens, with a number or a truth for each query and key."""
    heads = h.unflatten(-1, (2, 3)).transpose(1, 2)
    return h + F.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(2)


def attends_without_heads(h: Tensor, mask: Tensor) -> Tensor:
    return h + F.scaled_dot_product_attention(h, h, h, mask)


def attends_by_itself(h: Tensor) -> Tensor:
    """To the tokens before, as a model of one's own may: with a triangle that is longer than its sequences."""
    heads = h.unflatten(-1, (2, 3)).transpose(1, 2)
    scores = heads @ heads.mT / 3**0.5
    scores = scores.masked_fill(TRIANGLE[: h.shape[1], : h.shape[1]] == 0, -torch.inf)
    return h + (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


def behind_unknown(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: unknown(linear(x))


def product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ linear.weight.t()


def scaled(factor: Any, layer: Toy, h: Tensor) -> Tensor:
    return factor * h + layer.mixer(h)


def with_four_axes(h: Tensor) -> Tensor:
    """Three layers whose stream has the channels in two axes."""
    stream = h.unflatten(2, (2, -1))
    for layer in (a, b, c):
        stream = stream + layer.mixer(stream.flatten(2)).unflatten(2, (2, -1))
    return stream.flatten(2)


a_unknown, b_unknown, c_unknown = (Otherwise(layer, in_proj=behind_unknown) for layer in (a, b, c))
a_product, b_product, c_product = (Otherwise(layer, out_proj=product) for layer in (a, b, c))


def convolves(h: Tensor) -> Tensor:
    """A layer whose convolution reads the stream itself."""
    x = OPS.causal_conv1d(h, c.conv[:HIDDEN], None, True)
    y, _ = OPS.selective_scan(x, x.cos(), c.A[:HIDDEN], x[..., :STATES], x[..., STATES:], None, None, None, True, None)
    return h + F.linear(y, matrix)


def with_tails(read: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """The last token of three such layers, and what is read of the stream before each of them."""
    tails = []
    for _ in range(3):
        tails.append(read(h)[:, -4:])
        h = convolves(h)
    return torch.cat([*tails, h[:, -1:].expand(-1, 4, -1)], -1)


def averaged_within(h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(h.sin(), matrix).float().mean(1, keepdim=True)


def averaged_after(h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(h.sin(), matrix)
    return y.float().mean(1, keepdim=True)


def gated(average: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return c(h * average(h))


WAYS: dict[str, Ways] = {
    "an unknown operation behind in_proj": (
        lambda h: c(b(a(h))),
        lambda h: c_unknown(b_unknown(a_unknown(h))),
        (),
    ),
    "an unknown operation between layers": (
        lambda h: c(b(a(h))[..., :]),
        lambda h: c(unknown(b(a(h)))),
        (),
    ),
    "the end of a stream that convolutions read": (
        lambda h: with_tails(lambda h: h * 1, h),
        lambda h: with_tails(lambda h: h, h),
        (),
    ),
    "what autocast made, averaged after it": (
        lambda h: gated(averaged_within, b(a(h))),
        lambda h: gated(averaged_after, b(a(h))),
        (),
    ),
    "out_proj as a matrix product": (lambda h: c(b(a(h))), lambda h: c_product(b_product(a_product(h))), ()),
    "a scaled residual, by a parameter": (
        lambda h: scaled(0.7, c, b(a(h))),
        lambda h: scaled(scale, c, b(a(h))),
        (),
    ),
    "a stream of four axes": (lambda h: c(b(a(h))), with_four_axes, ()),
    "a side input in flattened form": (
        lambda h, x: c(F.linear(b(a(h)) * x, matrix)),
        lambda h, x: c(F.linear(b(a(h)).reshape(-1, HIDDEN) * x.reshape(-1, HIDDEN), matrix).view(h.shape)),
        (side,),
    ),
    "a mask in flattened form": (
        lambda h, x: c(b(a(h)) * x[..., :1]),
        lambda h, x: c((b(a(h)).reshape(-1, HIDDEN) * x[..., :1].reshape(-1, 1)).view(h.shape)),
        (side,),
    ),
    "a mask of queries and keys": (
        lambda h, m: c(attends(b(a(h)), m.expand(h.shape[0], 2, -1, -1))),
        lambda h, m: c(attends(b(a(h)), m)),
        (square,),
    ),
    "the same with an axis before": (
        lambda h, m: c(attends(b(a(h)), m.expand(h.shape[0], 2, -1, -1))),
        lambda h, m: c(attends(b(a(h)), m[None])),
        (square,),
    ),
    "a mask for each head": (
        lambda h, m: c(attends(b(a(h)), torch.stack([m, -m]).expand(h.shape[0], -1, -1, -1))),
        lambda h, m: c(attends(b(a(h)), torch.stack([m, -m]))),
        (square,),
    ),
    "a mask of keys": (
        lambda h, m: c(attends(b(a(h)), m.expand(h.shape[0], 1, 1, -1))),
        lambda h, m: c(attends(b(a(h)), m[None])),
        (row,),
    ),
    "a mask where there are no heads": (
        lambda h, m: c(attends_without_heads(b(a(h)), m.expand(h.shape[0], -1, -1))),
        lambda h, m: c(attends_without_heads(b(a(h)), m)),
        (square,),
    ),
    "attention that a model writes out": (
        lambda h: c(attends(b(a(h)), torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril())),
        lambda h: c(attends_by_itself(b(a(h)))),
        (),
    ),
    "one mask for attention with heads and without": (
        lambda h, m: c(attends(attends_without_heads(b(a(h)), m[None]), m[None, None])),
        lambda h, m: c(attends(attends_without_heads(b(a(h)), m), m)),
        (square,),
    ),
}


def pruned(function: Callable[..., Any], *inputs: Tensor) -> Tensor:
    """What a function of three layers gives with two thirds and then a third of its tokens."""
    captured = Captured(function, tokens(), *inputs)
    result = transform(captured.gm, Options.from_mapping({"min_tokens": 1, "schedule": [1.0, 0.7, 0.35]}))
    assert [mixer.reason for mixer in result.mixers] == [None] * 3
    assert result.pruned is not None
    with torch.no_grad():
        everything = result.pruned(*captured.args, 20, 20)[0]
        few: Tensor = result.pruned(*captured.args, 14, 7)[0]
    torch.testing.assert_close(everything, captured.result, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(few, everything, rtol=1e-2)
    return few


@pytest.mark.parametrize("name", WAYS)
def test_written_otherwise_it_prunes_to_the_same(name: str) -> None:
    plainly, otherwise, inputs = WAYS[name]
    torch.testing.assert_close(pruned(otherwise, *inputs), pruned(plainly, *inputs), rtol=1e-4, atol=1e-5)

"""Which norms are fused, with what stands around them, and what must be left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import HIDDEN, OPS, Captured, half_written, normed, tokens

from simba_compile.passes import lower
from simba_compile.passes.length import value_of
from simba_compile.passes.tokens import CASTS

weight = torch.rand(HIDDEN) + 0.5
NORMS: dict[str, tuple[Callable, int]] = {
    "plain": (lambda h: weight * normed(h), 1),
    "weight last": (lambda h: normed(h) * weight, 1),
    "no weight": (lambda h: normed(h), 1),
    "in halves": (lambda h: (weight.half() * normed(h.half().float()).half()).float(), 1),
    "in halves, with a weight in float32": (
        lambda h: (weight.half().float() * normed(h.half().float())).half().float(),
        1,
    ),
    "rounded after the weight, and read before": (
        lambda h: (lambda y: y.half() + y)(weight * normed(h.half().float())),
        0,
    ),
    "over tokens": (lambda h: weight * normed(h, 1), 0),
    "over a list of one": (lambda h: weight * normed(h, [-1]), 1),
    "over a tuple of one": (lambda h: weight * normed(h, (-1,)), 1),
    "over tokens in a tuple": (lambda h: weight * normed(h, (-2,)), 0),
    "cubes": (lambda h: weight * (h * torch.rsqrt(h.pow(3).abs().mean(-1, keepdim=True) + 1e-5)), 0),
    "of another": (lambda h: weight * (h * torch.rsqrt((h + 1).pow(2).mean(-1, keepdim=True) + 1e-5)), 0),
    "used twice": (lambda h: normed(h) * weight + normed(h), 2),
    "one weight for all": (lambda h: torch.full((1,), 2.0) * normed(h), 0),
    "written between": (lambda h: (lambda x: (lambda s, _: s * (x + 1))(normed(x), x.mul_(2)))(h.clone()), 1),
    "a copy written": (lambda h: (lambda x, _: weight * normed(x))(*half_written(h.clone())), 0),
    "itself written": (lambda h: (lambda x, _: weight * x)(*half_written(normed(h))), 0),
    "a copy of it written": (lambda h: (lambda x, _: weight * x)(*half_written(normed(h).clone())), 0),
}


@pytest.mark.parametrize("case", NORMS)
def test_lower_fuses_norms_and_only_norms(case: str) -> None:
    function, count = NORMS[case]
    captured = Captured(function, tokens())
    if case.startswith("in halves"):  # most families round before the weight, the operator after it
        captured.result = captured.result.half().float()
        lower(captured.gm)
        with torch.no_grad():
            torch.testing.assert_close(captured.gm(*captured.args)[0], captured.result, rtol=2e-3, atol=2e-3)
        assert captured.targets().count(OPS.rms_norm) == count
        weights = [value_of(node.args[1]).dtype for node in captured.gm.graph.nodes if node.target is OPS.rms_norm]
        assert weights == [torch.float16]  # as it was given
    else:
        assert captured.lowered().count(OPS.rms_norm) == count


GATED: dict[str, tuple[Callable, int]] = {
    "two groups": (lambda h: gated(h, h + 1, 2), 1),
    "one group": (lambda h: gated(h, h + 1, 1), 1),
    "not grouped": (lambda h: weight * normed(h * F.silu(h + 1)), 1),
    "not grouped, and the product is written": (
        lambda h: (lambda y, _: weight * normed(y))(*half_written(h * F.silu(h + 1))),
        0,
    ),
    "not grouped, over tokens": (lambda h: weight * normed(h * F.silu(h + 1), 1), 0),
    "in float32": (lambda h: weight * groups_normed(h.float() * F.silu((h + 1).float()), 2).to(h.dtype), 1),
    "no gate": (lambda h: weight * groups_normed(h * torch.sigmoid(h), 2), 0),
    "no product": (lambda h: weight * groups_normed(h.sin(), 2), 0),
    "groups across tokens": (lambda h: weight * normed((h * F.silu(h + 1)).view(len(h), -1, 3)).view(h.shape), 0),
    "a gate of one channel": (lambda h: gated(h, h[..., :1], 2), 0),
    "one token": (lambda h: gated(h[:, 0], h[:, 0] + 1, 2), 1),
    "a write elsewhere": (lambda h: (lambda x, _: gated(h, h + 1, 2) + x)(*half_written(h.clone())), 1),
    "an update reads what the gate is a part of": (lambda h: _updated(h), 1),
    "a gate written": (lambda h: (lambda z, y, _: weight * groups_normed(h * y, 2))(*silu_written(h.clone())), 0),
    "a product written": (lambda h: (lambda y, _: weight * groups_normed(y, 2))(*half_written(h * F.silu(h + 1))), 0),
}


def _updated(h: Tensor) -> Tensor:
    """A step of Mamba-2: what reads the projection writes to a window, not to the projection."""
    x, z, _ = F.linear(h, torch.ones(3 * HIDDEN, HIDDEN)).chunk(3, -1)
    step = OPS.conv_update(torch.zeros(len(h), HIDDEN, 4), x[:, 0], torch.ones(HIDDEN, 4), None, True)
    return gated(x + step[:, None], z, 2)


def silu_written(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gate, applied and then written to."""
    return z, F.silu(z), half_written(z)[1]


def groups_normed(h: Tensor, groups: int) -> Tensor:
    """As Hugging Face writes it."""
    grouped = h.view(*h.shape[:-1], groups, h.shape[-1] // groups)
    return (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + 1e-5)).view(*h.shape[:-1], h.shape[-1])


def gated(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """The norm after the scan of Mamba-2."""
    return weight * groups_normed(h * F.silu(z), groups)


@pytest.mark.parametrize("case", GATED)
def test_fuse_gated_norm(case: str) -> None:
    function, count = GATED[case]
    assert Captured(function, tokens()).lowered().count(OPS.gated_norm) == count


def some(h: Tensor, batch: int) -> Tensor:
    """Four of the tokens, the same of each sequence."""
    return OPS.gather(h, torch.tensor([[0, 3, 4, 19]]).expand(batch, -1), 1)


def norm_of_sum(stream: Tensor, x: Tensor) -> Tensor:
    """What the layers of a model in halves do between one another, its stream in float32."""
    total = stream + x
    return normed(total.half().float()).half() + total


def _sum_read_first(h: Tensor) -> Tensor:
    total = h + h.half()
    return total.sum() + normed(total.half().float()).half()


def _rounded_read_twice(h: Tensor) -> Tensor:
    rounded = (h + h.half()).half()
    return normed(rounded.float()).half() + rounded.float()


def _stream_written(h: Tensor) -> Tensor:
    stream = h.clone()
    total = stream + h.half()
    stream.mul_(2)
    return normed(total.half().float()).half() + stream


def _sum_written(h: Tensor) -> Tensor:
    total = h + h.half()
    rounded = total.half()
    total.mul_(2)
    return normed(rounded.float()).half() + total


def _source_written(h: Tensor) -> Tensor:
    source = h.clone()
    stream = some(source, len(h))
    source.mul_(2)
    return norm_of_sum(stream, h[:, :4].half()) + source.mean()


def _channels_turned(h: Tensor) -> Tensor:
    order = torch.arange(HIDDEN).flip(0).expand(len(h), -1)
    return norm_of_sum(OPS.gather(h, order, 2), h.half())


SUMS: dict[str, tuple[Callable, list[bool]]] = {  # for each that is fused, whether it gathers the stream, too
    "a wider stream": (lambda h: norm_of_sum(h, h.half()), [False]),
    "the stream last": (lambda h: norm_of_sum(h.half(), h), [False]),
    "kept tokens": (lambda h: norm_of_sum(some(h, len(h)), h[:, :4].half()), [True]),
    "kept tokens, the stream last": (lambda h: norm_of_sum(h[:, :4].half(), some(h, len(h))), [True]),
    "kept tokens of one stream": (lambda h: norm_of_sum(some(h[:1], len(h)), h[:, :4].half()), [False]),
    "kept tokens that are read again": (
        lambda h: (lambda k: norm_of_sum(k, h[:, :4].half()) + k)(some(h, len(h))),
        [False],
    ),
    "kept tokens whose source is written": (_source_written, [False]),
    "channels that are gathered": (_channels_turned, [False]),
    "one type": (lambda h: (lambda y: weight * normed(y) + y)(h + h.sin()), [False]),
    "nothing but the norm is read": (lambda h: weight * normed(h + h.sin()), [False]),
    "the norm in float32": (lambda h: weight * normed(h + h.half()), []),
    "a stream in float64": (lambda h: norm_of_sum(h.double(), h.half()), []),
    "one row for all": (lambda h: weight * normed(h + weight), []),
    "a number": (lambda h: weight * normed(h + 1), []),
    "a share": (lambda h: weight * normed(torch.add(h, h.sin(), alpha=2)), []),
    "a sum that is read first": (_sum_read_first, []),
    "a rounded sum that is read twice": (_rounded_read_twice, []),
    "a stream written between": (_stream_written, []),
    "a sum written between": (_sum_written, []),
}


@pytest.mark.parametrize("case", SUMS)
def test_fuse_add_norm(case: str) -> None:
    function, gathers = SUMS[case]
    captured = Captured(function, tokens())
    captured.lowered(2e-2)  # of halves, one may be rounded the other way
    fused = [node for node in captured.gm.graph.nodes if node.target is OPS.add_norm]
    assert [node.args[4] is not None for node in fused] == gathers


ROUNDED: dict[str, tuple[Callable, int]] = {  # and how many casts are left
    "to halves": (lambda h: gated(h, h + 1, 2).to(torch.bfloat16), 0),
    "as another value": (lambda h: gated(h, h + 1, 2).type_as(weight.half()), 0),
    "twice": (lambda h: gated(h, h + 1, 2).half().bfloat16(), 1),
    "read as it is, too": (lambda h: (lambda y: y.half() + y)(gated(h, h + 1, 2)), 1),
    "to whole numbers": (lambda h: gated(h, h + 1, 2).to(torch.int64), 1),
    "a gate written between": (
        lambda h: (lambda z, n: (lambda y, _: y.half() + z.half())(gated(n, z, 2), z.mul_(2)))(h.clone(), h + 1),
        2,
    ),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_the_gated_norm_rounds_itself(case: str) -> None:
    function, left = ROUNDED[case]
    after = Captured(function, tokens()).lowered(2e-2)  # of halves, one may be rounded the other way
    assert after.count(OPS.gated_norm) == 1
    assert sum(target in CASTS for target in after) == left

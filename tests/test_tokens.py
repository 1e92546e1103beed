"""Which operations may run on fewer tokens, one at a time: the lists of `tokens`, and attention."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph
from toys import HIDDEN, OPS, Captured, matrix, tokens

from simba_compile.passes.attention import why_not
from simba_compile.passes.effects import is_inplace, is_random, written
from simba_compile.passes.length import FLAT, Length, value_of
from simba_compile.passes.tokens import POINTWISE, is_one_result, is_tokenwise


def test_length_finds_the_argument_that_shows_it() -> None:
    captured = Captured(lambda h: h.view(h.shape[0], h.shape[1] * HIDDEN), tokens())
    inputs = captured.gm.graph.find_nodes(op="placeholder")
    numbers = [node for node in inputs if not isinstance(value_of(node), Tensor)]
    (given_input,) = set(inputs) - set(numbers)
    length = Length(value_of(given_input))
    ((place, axis),) = length.find(inputs)
    assert axis is None and captured.args[place] == 20
    assert [axis for _, axis in length.find([*(node for node in numbers if node is not inputs[place]), given_input])] == [1]
    with pytest.raises(ValueError, match="no input of the graph has the length"):
        length.find([])


column = torch.randn(HIDDEN, 3)
HEADS = torch.randn(2, 3, 3)
TOKENWISE: dict[str, tuple[Callable[[Tensor], Any], bool]] = {  # the last operation of each, and whether it is
    "a function of each number": (lambda h: torch.tanh(h), True),
    "an activation": (lambda h: F.hardtanh(h), True),
    "an activation that draws numbers": (lambda h: F.rrelu(h, training=True), False),
    "a mixture": (lambda h: torch.lerp(h, h.sin(), 0.3), True),
    "a product added": (lambda h: h.addcmul(h.sin(), h.cos(), value=0.5), True),
    "by an operator": (lambda h: h % 0.3, True),
    "truths": (lambda h: torch.logical_xor(h > 0, h.sin() > 0.3), True),
    "rows": (lambda h: h.flatten(0, 1), True),
    "a function of rows": (lambda h: h.flatten(0, 1) * 2, True),
    "rows of channels and tokens": (lambda h: h.transpose(1, 2).reshape(h.shape[0] * h.shape[1], HIDDEN), False),
    "heads": (lambda h: h.view(h.shape[0], h.shape[1], 2, 3), True),
    "channels before tokens": (lambda h: h.reshape(h.shape[0], HIDDEN, h.shape[1]), False),
    "over channels": (lambda h: h.sum(-1), True),
    "over channels, by name": (lambda h: h.mean(dim=[2]), True),
    "over everything": (lambda h: h.sum(), False),
    "over tokens": (lambda h: h.amax(1, keepdim=True), False),
    "over the batch": (lambda h: h.softmax(0), False),
    "over a batch that stands twice": (
        lambda h: h.unsqueeze(1).expand(-1, h.shape[0], -1, -1).transpose(0, 1).mean(1),
        False,
    ),
    "along tokens": (lambda h: h.cumsum(1), False),
    "along channels": (lambda h: h.cumsum(-1), True),
    "halves of channels": (lambda h: F.glu(h), True),
    "halves of tokens": (lambda h: F.glu(h, 1), False),
    "of one length": (lambda h: F.normalize(h, dim=-1), True),
    "tokens of one length": (lambda h: F.normalize(h), False),
    "lengths": (lambda h: h.norm(dim=-1), True),
    "lengths, by an operator": (lambda h: torch.linalg.vector_norm(h, 2, -1), True),
    "lengths over tokens": (lambda h: h.norm(2, 1), False),
    "spread": (lambda h: h.var(-1, keepdim=True, unbiased=False), True),
    "spread and mean": (lambda h: torch.var_mean(h, 2), True),
    "spread of everything": (lambda h: h.transpose(0, 1).unsqueeze(0).var(False), False),
    "largest": (lambda h: h.max(-1), True),
    "largest over tokens": (lambda h: h.max(1), False),
    "the larger of two": (lambda h: torch.max(h, h.sin()), False),
    "as one": (lambda h: F.cosine_similarity(h, h.sin(), -1), True),
    "the second": (lambda h: h.kthvalue(2).values, True),
    "which": (lambda h: F.one_hot(h.argmax(-1), HIDDEN), True),
    "channels repeated, the tokens too": (lambda h: h.tile(2, 1), False),
    "channels repeated, of fewer axes": (lambda h: h[..., :2].tile(3), True),
    "products of heads": (lambda h: torch.einsum("bthd,hde->bthe", h.unflatten(2, (2, 3)), HEADS), True),
    "products of channels": (lambda h: torch.einsum("...d, de -> e...", h, matrix), True),
    "three in one product": (lambda h: torch.einsum("btd,bte,de->bt", h, h.sin(), matrix), True),
    "all products": (lambda h: torch.einsum("btd,bsd->bts", h, h), False),
    "sums over tokens": (lambda h: torch.einsum("btd,bte->bde", h, h), False),
    "one token of each sequence": (lambda h: torch.einsum("ttd->td", h.flatten(0, 1)[:, None].expand(-1, 40, -1)), False),
    "sequences summed": (lambda h: torch.einsum("btd,ctd->ct", h, h), False),
    "complex numbers": (lambda h: torch.view_as_complex(h.unflatten(-1, (-1, 2))), True),
    "turned by angles": (
        lambda h: torch.view_as_complex(h.unflatten(-1, (-1, 2))) * torch.polar(h[..., :3], h[..., 3:]),
        True,
    ),
    "parts of complex numbers": (lambda h: torch.view_as_real(torch.complex(h, h.sin())), True),
    "a part of complex numbers": (lambda h: torch.imag(torch.complex(h, h.sin())), True),
    "largest channels": (lambda h: h.topk(2), True),
    "into channels of each token": (lambda h: h.scatter(2, (0 * h[..., :2]).long(), 0.0), True),
    "into channels of one token": (lambda h: h.scatter(2, (0 * h[:, :1, :2]).long(), 0.0), False),
    "added to channels of each token": (lambda h: h.scatter_add(2, h.argsort(2), h.sin()), True),
    "reduced to channels of each token": (lambda h: h.scatter_reduce(2, h.argsort(2), h.sin(), "amax"), True),
    "added to tokens": (lambda h: h.scatter_add(1, h.argsort(1), h.sin()), False),
    "channels backwards": (lambda h: h.flip(-1), True),
    "channels backwards, by a list": (lambda h: torch.flip(h, [2]), True),
    "channels and tokens backwards": (lambda h: h.flip(2, 1), False),
    "tokens and channels backwards": (lambda h: h.flip([1, 2]), False),
    "channels moved on": (lambda h: h.roll(1, 2), True),
    "channels moved on, twice": (lambda h: torch.roll(h, (1, 2), (2, -1)), True),
    "numbers moved on": (lambda h: h.roll(1), False),
    "tokens moved on": (lambda h: h.roll((1, 1), (2, 1)), False),
    "chosen channels": (lambda h: h.index_select(2, column[:, 0].argsort()), True),
    "chosen tokens": (lambda h: h.index_select(1, column[:, 0].argsort()), False),
    "chosen sequences": (lambda h: h.index_select(0, column[0, :2].argsort()), False),
    "channels repeated": (lambda h: h[..., :1].repeat(1, 1, 4), True),
    "channels repeated, by a list": (lambda h: h.repeat([1, 1, 2]), True),
    "tokens repeated": (lambda h: h.repeat(1, 2, 1)[:, : h.shape[1]].repeat(1, 2, 1), False),
    "sequences repeated": (lambda h: h.repeat(2, 1, 1), False),
    "an axis more": (lambda h: h.repeat(1, 1, 1, 2), False),
    "each channel twice": (lambda h: h.repeat_interleave(2, 2), True),
    "each channel twice, by name": (lambda h: torch.repeat_interleave(h, 2, dim=-1), True),
    "each token twice": (lambda h: h.repeat_interleave(2, 1), False),
    "channels by numbers": (
        lambda h: h.repeat_interleave(torch.ones(HIDDEN, dtype=torch.long), 2, output_size=HIDDEN),
        False,
    ),
    "like it": (lambda h: torch.full_like(h, 2.0), True),
    "tokens in order": (lambda h: h.sort(1), False),
    "one beside the other": (lambda h: torch.cat([h, 2 * h], 2), True),
    "one after the other": (lambda h: torch.cat([h, h], 1), False),
    "with nothing after it": (lambda h: torch.cat([h, h[:, :0]], 1), True),
    "another batch": (lambda h: torch.cat([h, h], 0), False),
    "stacked before tokens": (lambda h: torch.stack([h, 2 * h], 1), True),
    "stacked last": (lambda h: torch.stack([h, 2 * h], -1), True),
    "without an axis of one": (lambda h: h[..., :1].squeeze(2), True),
    "without any axis of one": (lambda h: h[..., :1].squeeze(), False),
    "turned": (lambda h: h.transpose(1, 2), True),
    "projected": (lambda h: F.linear(h, matrix), True),
    "a product": (lambda h: h @ column, True),
    "scores": (lambda h: h @ h.transpose(1, 2), False),
    "layer norm": (lambda h: F.layer_norm(h, (HIDDEN,)), True),
    "RMS norm": (lambda h: F.rms_norm(h, (HIDDEN,), column[:, 0]), True),
    "layer norm of tokens": (lambda h: F.layer_norm(h, h.shape[1:]), False),
    "layer norm of tokens, by their number": (lambda h: F.layer_norm(h, (h.shape[1], HIDDEN)), False),
    "an embedding": (lambda h: F.embedding(h.argmax(-1), matrix), True),
    "an embedding out of all rows": (lambda h: F.embedding(h.argmax(-1), h.flatten(0, 1)), False),
    "an embedding out of sequences": (lambda h: F.embedding(torch.arange(2).flip(0), h[:, :, 0]), False),
    "one channel": (lambda h: h[:, :, 0], True),
    "one channel, selected": (lambda h: h.select(2, 1), True),
    "some channels": (lambda h: torch.narrow(h, 2, 1, 3), True),
    "each channel apart": (lambda h: h.unbind(2), True),
    "channels in parts": (lambda h: torch.tensor_split(h, 4, -1), True),
    "an axis moved": (lambda h: h.movedim(1, 2), True),
    "one token": (lambda h: h[:, 0], False),
    "one token, selected": (lambda h: h.select(1, 0), False),
    "tokens, narrowed": (lambda h: h.narrow(1, 1, h.shape[1] - 1), False),
    "some tokens": (lambda h: h[:, 1:], False),
    "positions": (lambda h: h + torch.arange(h.shape[1])[None, :, None], True),
    "positions on another axis": (lambda h: h[:, :, :1] + torch.arange(h.shape[1]), False),
    "tokens of one with channels of another": (lambda h: h[:, :, 0] + h.transpose(1, 2)[:, 0], True),
    "all tokens with all": (lambda h: h[:, :, 0, None] * h[:, None, :, 0], False),
}


@pytest.mark.parametrize("case", TOKENWISE)
def test_tokenwise_is_what_gives_kept_tokens_the_same(case: str) -> None:
    function, expected = TOKENWISE[case]
    h = tokens()
    captured = Captured(function, h)
    (node, *_) = captured.gm.graph.output_node().args[0]
    node = node.args[0] if is_one_result(node) else node
    (example,) = [
        value_of(n) for n in captured.gm.graph.find_nodes(op="placeholder")
        if isinstance(value_of(n), Tensor) and value_of(n).shape[-1] == HIDDEN and value_of(n).dim() == 3
    ]  # fmt: skip
    length = Length(example)
    assert is_tokenwise(node, length) == expected
    if expected and case != "positions":  # which are gathered themselves
        kept = torch.tensor([0, 3, 19])
        whole, part = function(h), function(h[:, kept])
        for all_tokens, few in zip(whole, part, strict=True) if isinstance(whole, tuple) else [(whole, part)]:
            rows = all_tokens.unflatten(0, (2, 20)) if length.of(node) == FLAT else all_tokens
            taken = rows.index_select(max(length.of(node), 1), kept)
            torch.testing.assert_close(few, taken.flatten(0, 1) if length.of(node) == FLAT else taken)


def calls_of(target: Any) -> list[Callable[..., Tensor]]:
    """What is known as pointwise, called with as many tensors or numbers as it takes."""
    function = getattr(Tensor, target) if isinstance(target, str) else target
    return [
        lambda h, g, i: function(h),
        lambda h, g, i: function(h, g),
        lambda h, g, i: function(h, g, g.cos()),
        lambda h, g, i: function(h, 0.5, 0.7),
        lambda h, g, i: function(h, torch.float64),
        lambda h, g, i: function(i),
        lambda h, g, i: function(i, i.flip(2)),
        lambda h, g, i: function(h > 0.3, h, g),
        lambda h, g, i: function(h, g > 0.3, 0.5),
        lambda h, g, i: function(h, 1),
    ]


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
def test_what_torch_calls_pointwise_is() -> None:
    """Computed for some tokens alone, it gives what they have among all."""
    tensors = (*torch.rand(2, 2, 20, HIDDEN), torch.randint(1, 9, (2, 20, HIDDEN)))
    kept = torch.tensor([0, 3, 19])
    for target in sorted(POINTWISE - {F.dropout}, key=str):
        compared = 0
        for call in calls_of(target):
            try:
                whole = call(*(value.clone() for value in tensors))  # what is truth to one may be `inplace` to another
            except (TypeError, RuntimeError, ValueError):
                continue  # it takes other arguments
            if not isinstance(whole, Tensor):
                continue  # compared with a type
            torch.testing.assert_close(call(*(value[:, kept] for value in tensors)), whole[:, kept], equal_nan=True)
            compared += 1
        assert compared, f"{target} was never called"


def in_a_buffer(keys: Tensor) -> Tensor:
    """Copied into a larger tensor, as a static cache does."""
    return torch.zeros(keys.shape[0], 2, 64, 3).index_copy(2, torch.arange(keys.shape[2]), keys)


def heads(h: Tensor) -> Tensor:
    """(batch, head, token, channel)."""
    return h.unflatten(-1, (2, 3)).transpose(1, 2)


ATTENTION: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "no mask": (lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h)), None),
    "a square mask": (lambda h: attend(h, (h @ h.transpose(1, 2))[:, None]), None),
    "a mask of keys": (lambda h: attend(h, h[:, None, None, :, 0]), None),
    "a mask for every sequence": (lambda h: attend(h, torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()), None),
    "a mask for all sequences": (lambda h: attend(h, (h @ h.transpose(1, 2))[:1, None]), None),
    "a mask of queries": (lambda h: attend(h, h[:, None, :, :1]), "the mask of attention is"),
    "channels before tokens": (
        lambda h: F.scaled_dot_product_attention(*[heads(h).transpose(2, 3)] * 3),
        "the query of attention does not have one row for each token",
    ),
    "heads before the batch": (
        lambda h: F.scaled_dot_product_attention(*[heads(h).transpose(0, 1)] * 3),
        "the query of attention does not have one row for each token",
    ),
    "keys of something else": (
        lambda h: F.scaled_dot_product_attention(heads(h), heads(h[:, :4] * 2), heads(h[:, :4] * 2)),
        "the key of attention does not have one row for each token",
    ),
    "keys out of a buffer": (
        lambda h: F.scaled_dot_product_attention(heads(h), in_a_buffer(heads(h))[:, :, : h.shape[1]], heads(h)),
        "attention reads its keys from a cache of a fixed size",
    ),
}


@pytest.mark.parametrize(
    ("args", "kwargs", "random", "inplace"),
    [((0.5,), {}, True, False), ((0.5, False), {}, False, False), ((0.0,), {"training": True}, False, False),
     ((), {"p": 0.2, "training": True}, True, False), ((0.5, True, True), {}, True, True)],
)  # fmt: skip
def test_dropout_is_given_by_place_or_by_name(args: tuple, kwargs: dict[str, Any], random: bool, inplace: bool) -> None:
    graph = Graph()
    node = graph.call_function(F.dropout, (graph.placeholder("x"), *args), kwargs)
    assert is_random(node) is random and is_inplace(node) is inplace


def attend(h: Tensor, mask: Tensor) -> Tensor:
    """Attention with this mask."""
    return F.scaled_dot_product_attention(heads(h), heads(h), heads(h), mask)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_on_kept_tokens_and_why_not(case: str) -> None:
    function, expected = ATTENTION[case]
    graph = Captured(function, tokens()).gm.graph
    (node,) = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    example = next(value_of(n) for n in graph.find_nodes(op="placeholder") if isinstance(value_of(n), Tensor))
    reason = why_not(node, Length(example))
    assert reason is None if expected is None else str(reason).startswith(expected)


def writes_into_a_part(h: Tensor) -> Tensor:
    h[0] = 1.0
    return h


def writes_into_a_list(h: Tensor) -> Tensor:
    torch._foreach_mul_([h, column], 2.0)
    return h


WRITES: dict[str, tuple[Callable[[Tensor], Any], list[str] | None]] = {  # what may be written into, where anything is
    "an ordinary operation": (lambda h: h.mul(2), None),
    "a method": (lambda h: h.mul_(column.sum()), ["h"]),
    "an operator": (lambda h: operator.imod(h, 2), ["h"]),
    "an operator's method": (lambda h: h.__imul__(2), ["h"]),
    "an operator that makes a value": (lambda h: operator.imatmul(h, matrix), None),
    "an item": (lambda h: h.__setitem__(0, 1.0), ["h"]),
    "out": (lambda h: torch.mul(h, 2, out=h), ["h"]),
    "by place": (lambda h: F.dropout(h, 0.0, True, True), ["h"]),
    "not by place": (lambda h: F.dropout(h, 0.0, True, False), None),
    "by option": (lambda h: F.relu(h, inplace=True), ["h"]),
    "by option and by name": (lambda h: F.dropout(input=h, p=0.0, inplace=True), ["h"]),
    "a part": (writes_into_a_part, ["h"]),
    "an overload": (lambda h: torch.ops.aten.mul_.Tensor(h, h.detach()), ["h"]),
    "an overload, by name": (lambda h: torch.ops.aten.mul_.Tensor(other=h.sin(), self=h), ["h"]),
    "an overload's out": (lambda h: torch.ops.aten.mul.out(h.sin(), h.cos(), out=h), ["h"]),
    "an overload's list": (lambda h: torch.ops.aten._foreach_mul_.List([h], [h.detach()]), ["h"]),
    "an update of ours": (lambda h: OPS.conv_update(h.transpose(1, 2), h[:, 0], h[0].mT, None, True), ["transpose"]),
    "an overload that does not write": (lambda h: torch.ops.aten.mul.Tensor(h, h), None),
    "an operator of ours": (lambda h: OPS.gather(h, torch.zeros(2, 1, dtype=torch.int64), 1), None),
    "a list": (writes_into_a_list, ["h", "column"]),
}


@pytest.mark.parametrize("case", WRITES)
def test_what_an_operation_writes_into(case: str) -> None:
    function, expected = WRITES[case]
    captured = Captured(function, tokens())
    writing = [node for node in captured.gm.graph.nodes if is_inplace(node)]
    assert len(writing) == (expected is not None)
    if expected is not None:
        found = {node.name.lower() for node in written(writing[0])}
        assert len(found) == len(expected) and all(any(name in one for one in found) for name in expected)


def test_sequences_of_several_results_are_those_of_the_first() -> None:
    captured = Captured(lambda h: h.sort(-1), tokens())
    example = next(
        value_of(node) for node in captured.gm.graph.find_nodes(op="placeholder") if isinstance(value_of(node), Tensor)
    )
    length = Length(example)
    assert length.batch_axis((example, example)) == 0 and length.batch_axis((None, example)) is None

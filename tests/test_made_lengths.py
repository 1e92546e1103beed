"""Models whose mixers work on more or fewer tokens than the inputs have: class tokens, prompt tuning, joined sequences.

What such a model computes when it prunes is what it computes of the made sequence, given as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from conftest import KEEP_FEW, random_ids, simba
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import HIDDEN, Captured, matrix, tokens, toys

import simba_compile
from simba_compile import Options
from simba_compile.passes import Transformed, transform
from simba_compile.passes.length import Length, value_of

VIRTUAL, LENGTH = 5, 43
model = toys(2)
first = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
other = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(2))


def each(part: Tensor, h: Tensor) -> Tensor:
    """The same tokens for every sequence of h."""
    return part.expand(h.shape[0], -1, -1)


def in_the_middle(h: Tensor) -> Tensor:
    half = h.shape[1] // 2
    return torch.cat([h[:, :half], each(first, h), h[:, half:]], 1)


def masked_before(h: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([each(first, h), h * mask[:, :, None]], 1)


MADE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {  # of h, and what else they read
    "a class token": (lambda h: torch.cat([each(first, h), h], 1), ()),
    "a class token at the end": (lambda h: torch.cat([h, each(first, h)], 1), ()),
    "a class token in the middle": (in_the_middle, ()),
    "padded": (lambda h: nn.functional.pad(h, (0, 0, 3, 0)), ()),
    "without the last": (lambda h: h[:, :-1], ()),
    "without the first": (lambda h: h[:, 2:], ()),
    "another sequence before it": (lambda h, x: torch.cat([x, h], 1), (other,)),
    "another sequence before it, and a class token": (lambda h, x: torch.cat([x, each(first, h), h], 1), (other,)),
    "twice": (lambda h: torch.cat([h, h], 1), ()),
    "a mask of the input's own tokens": (masked_before, (torch.arange(20).expand(2, -1) > 4,)),
}


OTHERWISE = {"placement": "layer", "protect_first": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in MADE), ("a class token", OTHERWISE), ("without the last", OTHERWISE)],
    ids=str,
)
def test_a_made_sequence_prunes_as_one_that_is_given(name: str, options: dict[str, Any]) -> None:
    make, inputs = MADE[name]
    chosen = Options.from_mapping({"min_tokens": 1, "schedule": [0.7, 0.35], **options})
    given = make(tokens(), *inputs)
    results = []
    for captured in (Captured(model, given), Captured(lambda h, *rest: model(make(h, *rest)), tokens(), *inputs)):
        result = transform(captured.gm, chosen)
        assert result.pruned is not None and result.plan is not None
        assert [mixer.reason for mixer in result.mixers] == [None] * 2
        count = result.plan.length.reader(result.dense.graph.find_nodes(op="placeholder"))(captured.args)
        assert count == given.shape[1]
        with torch.no_grad():
            results.append(result.pruned(*captured.args, *result.plan.inputs(count))[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[1], captured.result, rtol=1e-2)


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of what comes out, and of h
    "all": lambda y, h: y,
    "those of the input": lambda y, h: y[:, 1:],
    "those of the input, by their number": lambda y, h: y[:, -h.shape[1] :],
    "added to the input": lambda y, h: y[:, 1:] + h,
    "as rows": lambda y, h: y.reshape(-1, HIDDEN) @ matrix,
    "as so many rows": lambda y, h: y.reshape(h.shape[0] * (h.shape[1] + 1), HIDDEN) @ matrix,
    "as heads": lambda y, h: y.view(h.shape[0], h.shape[1] + 1, 2, 3).sin(),
    "the last": lambda y, h: y[:, -1],
    "the class token": lambda y, h: y[:, 0],
    "their mean": lambda y, h: y.mean(1),
}


@functools.cache
def pruned_alone(options: Options) -> Tensor:
    """What the model gives for the sequence with a class token where that is given as it is."""
    alone = Captured(model, MADE["a class token"][0](tokens()))
    result = transform(alone.gm, options)
    assert result.pruned is not None and result.plan is not None
    with torch.no_grad():
        out: Tensor = result.pruned(*alone.args, *result.plan.inputs(21))[0]
    return out


@pytest.mark.parametrize("name", READ)
def test_what_comes_out_may_be_read_in_any_way(name: str) -> None:
    read, (make, _) = READ[name], MADE["a class token"]
    options = Options.from_mapping({"min_tokens": 1, "schedule": [0.7, 0.35]})
    captured = Captured(lambda h: read(model(make(h)), h), tokens())
    result = transform(captured.gm, options)
    assert result.pruned is not None and result.plan is not None
    with torch.no_grad():
        found = result.pruned(*captured.args, *result.plan.inputs(21))[0]
    torch.testing.assert_close(found, read(pruned_alone(options), tokens()), rtol=1e-4, atol=1e-5)


def test_length_is_a_sum_of_sizes_that_the_arguments_show() -> None:
    joined = lambda h, x: (torch.cat([h, x, each(first, h), h], 1), h[:, : h.shape[1] // 2])  # noqa: E731
    captured = Captured(joined, tokens(), other)
    inputs = captured.gm.graph.find_nodes(op="placeholder")
    whole, half = (Length(value_of(node)) for node in captured.gm.graph.output_node().args[0])
    assert whole.is_symbolic and len(whole.find(inputs)) == 3 and whole.reader(inputs)(captured.args) == 50
    assert not half.is_symbolic
    with pytest.raises(ValueError, match="is no sum of sizes"):
        half.find(inputs)


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # whether what they make ends in padding
    "zeros at the end": (lambda h: nn.functional.pad(h, (0, 0, 0, 2)), True),
    "zeros at both ends": (lambda h: nn.functional.pad(h, [0, 0, 1, 1]), True),
    "zeros at the end, in another layout": (lambda h: nn.functional.pad(h.mT, (0, 2)).mT, True),
    "zeros at the end, joined": (lambda h: torch.cat([h, h.new_zeros(h.shape[0], 2, HIDDEN)], 1), True),
    "zeros at the start": (lambda h: nn.functional.pad(h, (0, 0, 2, 0)), False),
    "zeros at the start, joined": (lambda h: torch.cat([h.new_zeros(h.shape[0], 2, HIDDEN), h], 1), False),
    "moved by one": (lambda h: h + nn.functional.pad(h[:, 1:], (0, 0, 0, 1)), False),
    "zeros in the channels": (lambda h: nn.functional.pad(h[:, 1:, 2:], (0, 2)), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_sequence_that_is_padded_at_its_end_is_dense(name: str) -> None:
    make, is_padded = ENDS[name]
    captured = Captured(lambda h: model(make(h)), tokens())
    plan = transform(captured.gm, Options.from_mapping({"min_tokens": 1})).plan
    assert plan is not None and plan.ends_in_padding(captured.args) == is_padded


MASKS: dict[str, Callable[[Tensor], Tensor]] = {  # of a sequence behind a token of its own, made of the ids' mask
    "joined with ones": lambda mask: torch.cat([torch.ones(mask.shape[0], 1), mask], 1),
    "joined with ones like it": lambda mask: torch.cat([mask.new_ones(mask.shape[0], 1), mask], 1),
    "joined with the first": lambda mask: torch.cat([torch.ones_like(mask[:, :1]), mask], 1),
    "padded": lambda mask: nn.functional.pad(mask, (1, 0), value=1),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_inputs_are_read(name: str) -> None:
    def masked(h: Tensor, mask: Tensor) -> Tensor:
        return model(torch.cat([each(first, h), h], 1) * MASKS[name](mask)[:, :, None])

    mask = torch.ones(2, 20)
    captured = Captured(masked, tokens(), mask)
    plan = transform(captured.gm, Options.from_mapping({"min_tokens": 1})).plan
    assert plan is not None and not plan.ends_in_padding(captured.args)
    mask[1, -1] = 0
    assert plan.ends_in_padding(captured.args)


class Prompted(nn.Module):
    """Prompt tuning: a model behind virtual tokens, which are its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.embed = model, model.get_input_embeddings()
        shape = VIRTUAL, self.embed.embedding_dim
        self.virtual = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))

    def longer(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What the model takes."""
        batch = len(ids)
        return {
            "inputs_embeds": torch.cat([self.virtual.expand(batch, -1, -1), self.embed(ids)], 1),
            "attention_mask": torch.cat([torch.ones(batch, VIRTUAL), mask], 1),
        }

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits of all tokens, the virtual ones among them."""
        logits: Tensor = self.model(**self.longer(ids, mask), use_cache=False).logits
        return logits


def left_padded(length: int) -> Tensor:
    """A mask of two sequences."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :6] = 0
    return mask


@pytest.mark.parametrize(
    ("family", "small"), [("mamba", {}), ("zamba2", {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]})]
)
def test_prompt_tuning(family: str, small: dict[str, Any], graphs: list[Transformed], selected: list[Tensor]) -> None:
    """One graph for all lengths, from the first call on; its mask is heeded under any name."""
    prompted = Prompted(families.tiny_model(family, **small))
    fast, alone = simba(prompted, **KEEP_FEW), simba(prompted.model, **KEEP_FEW)
    with torch.no_grad():
        for length in (LENGTH, 2 * LENGTH):
            out = fast(random_ids(2, length), left_padded(length))
            count = len(selected)
            expected = alone(**prompted.longer(random_ids(2, length), left_padded(length)), use_cache=False).logits
            assert len(selected) == 2 * count > 0
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            selected.clear()
        ids, right = random_ids(2, LENGTH), left_padded(LENGTH).flip(1)
        torch.testing.assert_close(fast(ids, right), prompted(ids, right), rtol=1e-3, atol=1e-3)
        assert not selected and len(graphs) == 2


def test_a_batch_as_large_as_the_prompt(graphs: list[Transformed], selected: list[Tensor]) -> None:
    fast = simba(Prompted(families.tiny_model("mamba")), **KEEP_FEW)
    with torch.no_grad():
        for batch, length in ((20, 20), (2, 30)):
            fast(random_ids(batch, length), torch.ones(batch, length))
            assert selected and len(graphs) == 1
            selected.clear()


def test_virtual_tokens_are_tuned(selected: list[Tensor]) -> None:
    """As they are where the made sequence is given."""
    prompted = Prompted(families.tiny_model("mamba"))
    ids, mask = random_ids(2, LENGTH), left_padded(LENGTH)
    alone = simba(prompted.model, **KEEP_FEW)
    gradients = []
    for run in (simba(prompted, **KEEP_FEW), lambda *given: alone(**prompted.longer(*given), use_cache=False).logits):
        run(ids, mask)[:, -1].square().sum().backward()
        assert prompted.virtual.grad is not None and prompted.virtual.grad.abs().max() > 0
        gradients.append(prompted.virtual.grad)
        prompted.virtual.grad = None
    assert selected
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_the_next_token_is_learned_within_what_is_compiled(graphs: list[Transformed], selected: list[Tensor]) -> None:
    """The model reads all ids but the last, whose number no input has."""
    model = families.tiny_model("mamba")

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fast = simba(loss, **KEEP_FEW)
    for length in (LENGTH, 60):
        found = fast(random_ids(2, length))
        logits = simba(model, **KEEP_FEW)(random_ids(2, length)[:, :-1]).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), random_ids(2, length)[:, 1:].flatten())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert selected and len(graphs) == 2


def test_explain_counts_the_tokens_that_mixers_work_on() -> None:
    prompted = Prompted(families.tiny_model("mamba"))
    with torch.no_grad():
        report = simba_compile.explain(prompted, random_ids(2, LENGTH), left_padded(LENGTH), options=KEEP_FEW)
    assert report.mixers[0].tokens_in == LENGTH + VIRTUAL and not any(mixer.reason for mixer in report.mixers)
    assert report.mixers[-1].tokens_out == round(0.2 * (LENGTH + VIRTUAL))


def test_a_backend_that_compiles_afterwards_sees_fixed_lengths() -> None:
    """What had Dynamo take second axes for ones that vary is taken back."""
    prompted = Prompted(families.tiny_model("mamba", num_hidden_layers=1))
    ids, mask = random_ids(2, 8), left_padded(8)  # a short prompt, for the other backend traces the scan's loop
    seen: list[Tensor] = []

    def another(gm: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        seen.extend(given)
        return gm

    with torch.no_grad():
        simba(prompted, **KEEP_FEW)(ids, mask)
        torch.compile(prompted, backend=another, fullgraph=True)(ids, mask)
    assert seen and all(type(size) is int for value in seen for size in value.shape)

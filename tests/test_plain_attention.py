"""Attention that a model computes by itself: it runs on kept tokens as PyTorch's does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import KEEP_FEW, cache_of, close, left_padding, random_ids, simba
from families import tiny_model
from torch import Tensor
from toys import HIDDEN, Captured, heads, tokens

from simba_compile.cli.models import going_on
from simba_compile.passes import Transformed
from simba_compile.passes.arguments import name_calls, place_arguments
from simba_compile.passes.functional import make_functional
from simba_compile.passes.length import Length, value_of
from simba_compile.passes.plain_attention import fuse_attention

KEY, VALUE = torch.randn(2, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
FIXED = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(1))


def scores(h: Tensor) -> Tensor:
    return heads(h) @ heads(h @ KEY).transpose(2, 3)


def weigh(weights: Tensor, h: Tensor) -> Tensor:
    return weights @ heads(h @ VALUE)


def weigh_all(keys: Tensor, h: Tensor) -> Tensor:
    queries = heads(h) if keys.dim() == 4 else h
    return (queries @ keys.transpose(-2, -1)).softmax(-1) @ keys


def as_transformers(h: Tensor, mask: Tensor) -> Tensor:
    weights = F.softmax(scores(h) * 0.3 + mask, dim=-1, dtype=torch.float32).to(h.dtype)
    return weigh(F.dropout(weights, p=0.4, training=False), h)


def with_weights(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(h).softmax(-1)
    return weigh(weights, h), weights


def with_dropped_weights(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.dropout(scores(h).softmax(-1), 1.0)
    return weigh(weights, h), weights


def with_scores(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = scores(h) * 0.3
    return weigh(found.softmax(-1), h), found


def written_in_between(h: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    found = scores(h) + mask
    mask.zero_()
    return weigh(found.softmax(-1), h) + mask.sum()


SLOPES = torch.tensor([0.5, 0.25])[:, None, None]
LEAST = torch.finfo(torch.float32).min

FUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "as transformers": as_transformers,
    "without a mask": lambda h, mask: weigh(torch.softmax(scores(h) * 0.3, -1), h),
    "without a scale": lambda h, mask: weigh((scores(h) + mask).softmax(-1), h),
    "the scores last": lambda h, mask: weigh((mask + 0.3 * scores(h)).softmax(3), h),
    "in another type": lambda h, mask: weigh((scores(h).double() * 0.3 + mask).softmax(-1).float(), h),
    "one mask for all queries": lambda h, mask: weigh((scores(h) + mask[:, :, :1]).softmax(-1), h),
    "divided": lambda h, mask: weigh((scores(h) / 3 + mask).softmax(-1), h),
    "a wider mask": lambda h, mask: weigh((scores(h) + mask.double()).softmax(-1).float(), h),
    "a narrower mask": lambda h, mask: weigh((scores(h) + mask.bfloat16()).softmax(-1), h),
    "a mask that is one for all": lambda h, mask: weigh((scores(h) + mask[:1]).softmax(-1), h),
    "dropout of nothing": lambda h, mask: weigh(F.dropout(scores(h).softmax(-1), 0.0), h),
    "by other names": lambda h, mask: weigh(torch.softmax(heads(h) @ heads(h @ KEY).mT, -1), h),
    "by einsum": lambda h, mask: torch.einsum(
        "bhqk, bhkd -> bhqd",
        (torch.einsum("b h i d, b h j d -> b h i j", heads(h), heads(h @ KEY)) + mask).softmax(-1),
        heads(torch.einsum("bnd,de->bne", h, VALUE)),
    ),
    "by einsum, heads behind tokens": lambda h, mask: torch.einsum(
        "bhqk,bkhd->bqhd",
        (torch.einsum("bqhd,bkhd->bhqk", h.unflatten(2, (2, -1)), (h @ KEY).unflatten(2, (2, -1))) + mask).softmax(-1),
        (h @ VALUE).unflatten(2, (2, -1)),
    ),
    "keys as columns": lambda h, mask: weigh(
        (heads(h) @ (h @ KEY).unflatten(2, (2, -1)).permute(0, 2, 3, 1) + mask).softmax(-1), h
    ),
    "replaced": lambda h, mask: weigh((scores(h) * 0.3).masked_fill(mask > 0, -torch.inf).softmax(-1), h),
    "replaced in place": lambda h, mask: weigh((scores(h) * 0.3).masked_fill_(mask > 0, -1e9).softmax(-1), h),
    "replaced where one is not seen": lambda h, mask: weigh(torch.where(mask > 0, scores(h) / 3, LEAST).softmax(-1), h),
    "replaced where one goes": lambda h, mask: weigh(torch.where(mask > 0, LEAST, scores(h)).softmax(-1), h),
    "replaced by the method": lambda h, mask: weigh(scores(h).where(mask > 0, -torch.inf).softmax(-1), h),
    "all replaced": lambda h, mask: weigh(scores(h).masked_fill(h[:, None, :, :1] > mask * 0, LEAST).softmax(-1), h),
    "all replaced, of large scores": lambda h, mask: weigh(
        (scores(h) * 50).masked_fill(h[:, None, :, :1] > mask * 0, -1e9).softmax(-1), h
    ),
    "replaced by a number in a tensor": lambda h, mask: weigh(
        torch.where(mask > 0, scores(h), torch.tensor(-1e9)).softmax(-1), h
    ),
    "replaced twice": lambda h, mask: weigh(
        torch.where(mask > 2, LEAST, scores(h).masked_fill(mask[:1] < -1, LEAST)).softmax(-1), h
    ),
    "added, then replaced": lambda h, mask: weigh(
        (scores(h) * 0.3 + SLOPES * mask)
        .masked_fill(mask[0] > 0.5, -torch.inf)
        .masked_fill(mask < -2, -torch.inf)
        .softmax(-1),
        h,
    ),
    "a narrower bias, then replaced": lambda h, mask: weigh(
        (scores(h) + mask.bfloat16()).masked_fill(mask > 0.5, LEAST).softmax(-1), h
    ),
    "replaced in another type": lambda h, mask: weigh(
        scores(h).double().masked_fill(mask > 0, LEAST).softmax(-1).float(), h
    ),
    "without heads": lambda h, mask: (h @ (h @ KEY).transpose(1, 2) * 0.3 + mask[:, 0]).softmax(-1) @ (h @ VALUE),
    "without heads, by another name": lambda h, mask: torch.bmm(torch.bmm(h, h.mT).softmax(2), h @ VALUE),
    "without heads, replaced": lambda h, mask: (h @ h.mT).masked_fill(mask[:, 0] > 0, LEAST).softmax(2) @ (h @ VALUE),
}
FUSED |= {
    "the weights are read": with_weights,
    "dropout": lambda h, mask: weigh(F.dropout(scores(h).softmax(-1), 1.0), h),
}
LEFT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the scores are read": with_scores,
    "weights that are dropped are read": with_dropped_weights,
    "dropped twice": lambda h, mask: weigh(F.dropout(F.dropout(scores(h).softmax(-1), 1.0)), h),
    "over the queries": lambda h, mask: weigh(scores(h).softmax(-2), h),
    "a scale for each head": lambda h, mask: weigh((scores(h) * KEY[:2, :1, None]).softmax(-1), h),
    "a scale that is a tensor": lambda h, mask: weigh((scores(h) * KEY[0, 0]).softmax(-1), h),
    "a mask of another type": lambda h, mask: weigh((scores(h) + (mask > 0)).softmax(-1), h),
    "a number divided by them": lambda h, mask: weigh((2 / (scores(h).abs() + 1)).softmax(-1), h),
    "divided by zero": lambda h, mask: weigh((scores(h) / 0).softmax(-1), h),
    "the length as a scale": lambda h, mask: weigh((scores(h) * h.shape[1]).softmax(-1), h),
    "whole numbers": lambda h, mask: weigh(scores(h).int().float().softmax(-1), h),
    "a mask for more heads": lambda h, mask: (scores(h)[:, :1] + KEY[:3, :1, None]).softmax(-1) @ heads(h @ VALUE)[:, :1],
    "a bias for more heads": lambda h, mask: (
        (scores(h)[:, :1] + torch.cat([mask, mask, mask], 1)).softmax(-1) @ heads(h @ VALUE)[:, :1]
    ),
    "to fixed states": lambda h, mask: (heads(h) @ heads(FIXED).transpose(2, 3)).softmax(-1) @ heads(FIXED),
    "pooling": lambda h, mask: (heads(FIXED)[:, :, :1] @ heads(h).transpose(2, 3)).softmax(-1) @ heads(h),
    "among the heads of a token": lambda h, mask: (
        (h.unflatten(2, (2, -1)) @ h.unflatten(2, (2, -1)).transpose(2, 3)).softmax(-1) @ h.unflatten(2, (2, -1))
    ),
    "one head of keys": lambda h, mask: weigh((heads(h) @ heads(h @ KEY)[:, :1].transpose(2, 3)).softmax(-1), h),
    "no swap": lambda h, mask: weigh((scores(h) @ scores(h)).softmax(-1), h),
    "written in between": written_in_between,
    "replaced in float16": lambda h, mask: (
        (heads(h).half() @ heads(h).half().transpose(2, 3)).float().masked_fill(mask > 0, -1e9).softmax(-1).half()
        @ heads(h).half()
    ),
    "more keys than tokens": lambda h, mask: weigh_all(heads(torch.cat([FIXED.expand(h.shape[0], -1, -1), h], 1)), h),
    "heads in the batch": lambda h, mask: weigh_all(heads(h).flatten(0, 1), heads(h).flatten(0, 1)),
    "replaced by no low number": lambda h, mask: weigh(scores(h).masked_fill(mask > 0, -50.0).softmax(-1), h),
    "replaced by a tensor": lambda h, mask: weigh(torch.where(mask > 0, scores(h), mask * 1e9).softmax(-1), h),
    "replaced by two numbers": lambda h, mask: weigh(
        scores(h).masked_fill(mask > 0, -1e9).masked_fill(mask < -1, LEAST).softmax(-1), h
    ),
    "replaced, then added": lambda h, mask: weigh((scores(h).masked_fill(mask > 0, -1e9) + mask).softmax(-1), h),
    "replaced by the largest": lambda h, mask: weigh(scores(h).masked_fill(mask > 1, 1e9).softmax(-1), h),
    "replaced for more heads": lambda h, mask: (
        scores(h)[:, :1].masked_fill(torch.cat([mask, mask, mask], 1) > 0, LEAST).softmax(-1) @ heads(h @ VALUE)[:, :1]
    ),
}


@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_attention_in_parts_is_fused(name: str) -> None:
    attend = {**FUSED, **LEFT}[name]
    captured = Captured(lambda h: attend(h, h[:, None, :, :1] * h[:, None, None, :, 1]), tokens())
    name_calls(captured.gm.graph)
    make_functional(captured.gm.graph)
    place_arguments(captured.gm.graph)
    h = next(node for node in captured.gm.graph.find_nodes(op="placeholder") if isinstance(value_of(node), Tensor))
    fuse_attention(captured.gm.graph, Length(value_of(h)))
    captured.gm.recompile()
    assert (F.scaled_dot_product_attention in captured.targets()) is (name in FUSED)
    with torch.no_grad():
        result = captured.gm(*captured.args)
    expected = captured.result if isinstance(captured.result, tuple) else (captured.result,)
    torch.testing.assert_close(tuple(result), expected, equal_nan=True)


def assert_fused(result: Transformed) -> None:
    """No weights of attention are computed."""
    for graph in (result.dense, result.pruned or result.dense):
        weights = [node for node in graph.graph.nodes if node.target is F.softmax and value_of(node).dim() == 4]
        assert not weights


@pytest.mark.parametrize(
    ("family", "dynamic"), [("jamba", None), ("jamba", True), ("zamba2", None), ("falcon_h1", None), ("nemotron_h", None)]
)
def test_eager_attention_runs_on_kept_tokens(family: str, dynamic: bool | None, graphs: list[Transformed]) -> None:
    """A prompt and a step on its cache, with ``attn_implementation="eager"``: as with PyTorch's own."""
    ids, mask, token = random_ids(2, 40), left_padding(2, 40), random_ids(2, 1, seed=1)
    logits = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(family)
        model.set_attn_implementation(attention)
        compiled = torch.compile(model, backend="simba", options=KEEP_FEW, dynamic=dynamic)
        with torch.no_grad():
            out = compiled(ids, attention_mask=mask, use_cache=True)
            keys = [layer.keys for layer in cache_of(out).layers if getattr(layer, "keys", None) is not None]
            assert any(entries.isnan().any() for entries in keys)  # pruned ones are marked
            longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            step = compiled(token, attention_mask=longer, **going_on(out), use_cache=True)
        logits.append((out.logits[mask.bool()], step.logits))
    for theirs, ours in zip(*logits, strict=True):
        close(ours, theirs, 1e-6)
    *_, prompt, step_graph = graphs
    assert prompt.pruned is not None
    assert_fused(prompt)
    assert_fused(step_graph)


@pytest.mark.parametrize("family", ["jamba", "bamba"])
def test_eager_attention_under_autocast(family: str, graphs: list[Transformed]) -> None:
    """Queries, keys and values may then be of two types, and the mask has numbers that are infinite in the narrower one."""
    ids, mask, logits = random_ids(2, 40), left_padding(2, 40), []
    for attention in ("sdpa", "eager"):
        model = tiny_model(family)
        model.set_attn_implementation(attention)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits.append(simba(model, **KEEP_FEW)(ids, attention_mask=mask).logits[mask.bool()])
    close(logits[1], logits[0], 1e-3)
    assert_fused(graphs[-1])


@pytest.mark.parametrize("family", ["jamba", "zamba2"])
def test_weights_that_are_returned_are_those_of_all_tokens(family: str) -> None:
    """With the stream that they had on leaving. Attention reads the kept tokens, as without weights; so do the steps."""
    model, ids, token = tiny_model(family), random_ids(2, 40), random_ids(2, 1, seed=1)
    model.set_attn_implementation("eager")
    compiled = simba(model, **KEEP_FEW)
    given = {"output_attentions": True, "use_cache": True}
    with torch.no_grad():
        expected = model(ids, **given)
        out = simba(model, keep=1.0)(ids, **given)
        pruned, plain = compiled(ids, **given), compiled(ids, use_cache=True)
        place = {"use_cache": True, "position_ids": torch.full((2, 1), 40)}
        step = compiled(token, **going_on(pruned), output_attentions=True, **place)
        plain_step = compiled(token, **going_on(plain), **place)
    close(out.logits, expected.logits, 1e-4)  # in float32, by PyTorch's kernel and by eager attention
    close(pruned.logits, plain.logits, 1e-5)
    close(step.logits, plain_step.logits, 1e-5)
    left = 0
    for theirs, ours, of_pruned, of_step in zip(*(o.attentions for o in (expected, out, pruned, step)), strict=True):
        close(ours, theirs, 1e-4)
        assert of_pruned.shape == theirs.shape
        for weights in (of_pruned, of_step):
            close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-5)
        left += int((of_step[0, 0, 0] == 0).sum())
    assert left >= 10  # tokens have left, and have no weight


@pytest.mark.parametrize("family", ["falcon_h1", "jamba"])
def test_a_second_prompt_on_a_pruned_cache(family: str) -> None:
    """Eager attention reads what the first one kept, as PyTorch's does."""
    model, ids = tiny_model(family), random_ids(2, 50)
    logits = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        compiled = simba(model, **KEEP_FEW)
        with torch.no_grad():
            out = compiled(ids[:, :40], use_cache=True)
            out = compiled(ids[:, 40:], **going_on(out), use_cache=True, position_ids=torch.arange(40, 50)[None])
        logits.append(out.logits)
        torch._dynamo.reset()
    close(logits[1], logits[0], 1e-4)


def test_dropped_weights_are_those_of_kept_tokens(graphs: list[Transformed]) -> None:
    """In training, too, no token is read that has left: those that stay have the gradients that they have alone."""
    model, ids = tiny_model("jamba"), random_ids(2, 40)
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.attention_dropout = 0.5
    simba(model.train(), **KEEP_FEW)(ids, logits_to_keep=1, use_cache=False).logits.sum().backward()
    model.eval()
    assert graphs[0].pruned is not None and graphs[0].on_all_tokens == []
    attentions = [node for node in graphs[0].pruned.graph.nodes if node.target is F.scaled_dot_product_attention]
    assert [node.args[4] for node in attentions] == [0.5] * 2

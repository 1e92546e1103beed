"""Caches that fewer tokens have entered: the marks of pruned entries, and attention that passes over them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import cache_of, random_ids, simba
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import Captured, tokens

from simba_compile.cli.models import going_on
from simba_compile.kernels import reference
from simba_compile.passes import Transformed
from simba_compile.passes.attention import _attention_past, attention_over_cache

OPS = torch.ops.simba
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_marks_survive_what_a_cache_does(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 3, 4], [1, 2, 5]])
    kept = torch.randn(2, 2, 3, 4).to(dtype)
    kept[0, 0, 0, 0] = torch.nan  # a NaN of the model's own is no mark
    full = OPS.cache_entries(kept, positions, 6, 2)
    gone = torch.ones(2, 6, dtype=torch.bool).scatter(1, positions, False)[:, None, :, None].expand(2, 2, 6, 4)
    assert torch.equal(reference.is_marked(full), gone) and full[gone].isnan().all()
    assert torch.equal(full.gather(2, positions[:, None, :, None].expand(2, 2, 3, 4)).isnan(), kept.isnan())
    grown = torch.cat([full, kept[:, :, :1]], -2)
    moved = copy.deepcopy(grown.index_select(0, torch.tensor([1, 0])).repeat_interleave(2, 0))[:, :, -7:].contiguous()
    assert torch.equal(reference.is_marked(moved)[1::2, :, :6], gone.flip(0))
    assert not reference.is_marked(moved[:, :, 6:]).any()
    assert not reference.is_marked(kept.to(torch.complex64)).any()  # where nothing is marked
    everywhere = torch.arange(3).expand(2, 3)  # opcheck takes no NaN in the result for equal
    torch.library.opcheck(OPS.cache_entries, (kept.nan_to_num(), everywhere, 3, 2))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_marks_survive_widening(narrow: torch.dtype, wide: torch.dtype) -> None:
    """Torch widens one by one, or many at once with other instructions."""
    for kept in (1, 5, 50, 2000):
        entries = torch.randn(1, 1, kept, 3).to(narrow)
        entries[..., 1:] = torch.nan
        full = OPS.cache_entries(entries, 2 * torch.arange(kept)[None], 2 * kept, 2)
        together = torch.cat([full, torch.zeros(1, 1, 1, 3, dtype=wide)], 2)[:, :, :-1]
        for widened in (full.to(wide), full[..., ::2].to(wide), together):
            assert reference.is_marked(widened[:, :, 1::2]).all() and not reference.is_marked(widened[:, :, ::2]).any()


@given(st.data())
def test_attention_over_a_cache_is_attention_to_what_is_left(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, tokens, queries = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    kept, channels = data.draw(st.integers(1, tokens)), data.draw(st.sampled_from([1, 6]))
    positions = torch.stack([torch.randperm(tokens)[:kept].sort().values for _ in range(batch)])
    query = torch.randn(batch, 4, queries, channels, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, kept, channels, dtype=torch.float64)
    cached = [OPS.cache_entries(x, positions, tokens, 2) for x in (key, value)]
    kind = data.draw(st.sampled_from(["none", "bool", "float", "two axes"]))
    mask = given = None
    if kind != "none":
        seen = torch.rand(batch, 1, queries, tokens) < 0.7
        seen[..., positions[:, -1].max()] = True
        seen = seen[:1].expand_as(seen) if kind == "two axes" else seen
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf) if kind == "float" else seen
        given = mask[0, 0] if kind == "two axes" else mask
    columns = positions[:, None, None].expand(-1, 1, queries, -1)
    expected = F.scaled_dot_product_attention(
        query, key, value, None if mask is None else mask.gather(3, columns), scale=0.3, enable_gqa=True
    )
    got = attention_over_cache(query, *cached, given, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected, equal_nan=True)
    marked = reference.is_marked(cached[0][:, 0, :, 0])
    on_a_gpu = _attention_past(marked, query, *cached, given, 0.0, False, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(on_a_gpu, expected, equal_nan=True)
    if kept < tokens and mask is None:  # what does not know the marks shows it
        assert F.scaled_dot_product_attention(query, *cached, enable_gqa=True).isnan().all()


READS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether the keys may be a cache's
    "an input": (lambda h: heads(h), True),
    "a piece of one": (lambda h: torch.cat([heads(2 * h), heads(h)], 2), True),
    "made here": (lambda h: heads(2 * h), False),
    "an input, copied": (lambda h: heads(h).repeat_interleave(2, 1)[:, :1].detach(), True),
    "made here, of the sizes of an input": (lambda h: (2 * h).view(h.shape[0], h.shape[1], 1, -1).transpose(1, 2), False),
}


def heads(h: Tensor) -> Tensor:
    """(batch, head, token, channel)."""
    return h.unsqueeze(2).transpose(1, 2)


@pytest.mark.parametrize("name", READS)
def test_keys_that_come_from_an_input_may_be_a_cache(name: str) -> None:
    keys, may = READS[name]
    lowered = Captured(lambda h: F.scaled_dot_product_attention(heads(h), keys(h), keys(h)), tokens()).lowered()
    assert (attention_over_cache in lowered) is may
    assert (F.scaled_dot_product_attention in lowered) is not may


def test_sequences_with_different_numbers_of_entries() -> None:
    """As after a batch of caches was put together by hand; also where Inductor compiles it, and causal."""
    key = torch.randn(2, 1, 5, 4)
    full = torch.cat([OPS.cache_entries(key[:1, :, :3], torch.tensor([[0, 2, 4]]), 5, 2), key[1:]])
    query = torch.randn(2, 1, 5, 4)
    got = attention_over_cache(query, full, full, is_causal=True)
    rows = key[:1, :, :3]
    causal = torch.arange(5)[:, None] >= torch.tensor([0, 2, 4])
    torch.testing.assert_close(got[:1], F.scaled_dot_product_attention(query[:1], rows, rows, causal))
    torch.testing.assert_close(got[1:], F.scaled_dot_product_attention(query[1:], key[1:], key[1:], is_causal=True))
    compiled = torch.compile(attention_over_cache, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, full, full, is_causal=True), got)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_sequences_with_different_numbers_of_entries(kind: str) -> None:
    key, query = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 3, 4)
    left = torch.tensor([0, 2, 4])
    full = torch.cat([OPS.cache_entries(key[:1, :, left], left[None], 5, 2), key[1:]])
    mask: Tensor = torch.rand(2, 1, 3, 5) < 0.7
    mask[..., 4] = True
    if kind == "float":
        mask = torch.randn(2, 1, 3, 5).masked_fill(~mask, -torch.inf)
    got = attention_over_cache(query, full, full, mask)
    rows = key[:1, :, left]
    torch.testing.assert_close(got[:1], F.scaled_dot_product_attention(query[:1], rows, rows, mask[:1, ..., left]))
    torch.testing.assert_close(got[1:], F.scaled_dot_product_attention(query[1:], key[1:], key[1:], mask[1:]))


def test_eager_attention_shows_that_entries_are_missing() -> None:
    """A pruned cache that the uncompiled model goes on from gives NaN, not tokens from a wrong context."""
    model, ids = tiny_model("bamba"), random_ids(2, 40)
    with torch.no_grad():
        out = simba(model, keep=0.3, min_tokens=4)(ids, use_cache=True)
        assert cache_of(out).get_seq_length() == 40  # positions and masks are made from it
        assert model(ids[:, -1:], **going_on(out), position_ids=torch.tensor([[40]])).logits.isnan().all()


@pytest.mark.parametrize("given", [None, 3], ids=["Dynamo's limit", "a limit of one's own"])
def test_a_limit_of_compilations_leaves_room_for_the_steps(given: int | None) -> None:
    """All models of transformers share a function that Dynamo counts; uncompiled, the last step would give NaN."""
    model, other = tiny_model("bamba"), tiny_model("falcon_h1")
    of_its_own = "recompile_limit" in inspect.signature(torch.compile).parameters  # torch 2.11 has one limit for all
    if given is not None and not of_its_own:
        pytest.skip("torch.compile takes no limit")
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        limit = {} if given is None else {"recompile_limit": given}
        for each, batch in ((other, 1), (model, 2)):  # each with a prompt and a step: the fourth graph is a step
            compiled = torch.compile(each, backend="simba", options={"keep": 0.3, "min_tokens": 4}, **limit)
            out = compiled(random_ids(batch, 40), use_cache=True)
            step = compiled(random_ids(batch, 1), **going_on(out), use_cache=True)
        assert step.logits.isnan().all() == (given is not None)
        assert (torch._dynamo.config.recompile_limit == 3) is (given is not None)


def test_what_is_compiled_when_there_are_many_graphs_finds_room(graphs: list[Transformed]) -> None:
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for keep in (0.3, 0.4, 0.5):
            simba(tiny_model("bamba"), keep=keep, min_tokens=4)(random_ids(1, 40), logits_to_keep=1)
    assert [graph.pruned is not None for graph in graphs] == [True] * 3


@pytest.mark.parametrize("family", ["jamba", "zamba", "nemotron_h"])
def test_a_prompt_under_autocast_and_steps_without(family: str) -> None:
    """Keys in bfloat16 are joined by others in float32; what is pruned among them is still known."""
    model, ids, token = tiny_model(family), random_ids(2, 40), random_ids(2, 1, seed=1)
    compiled = simba(model, keep=0.3, min_tokens=4)
    logits = []
    with torch.no_grad():
        for precise in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                out = compiled(ids, use_cache=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                step = compiled(token, **going_on(out), use_cache=True, position_ids=torch.full((2, 1), 40))
            logits.append(step.logits.float())
    precise, rounded = logits
    assert (precise - rounded).norm() < 0.1 * precise.norm()  # of what bfloat16 rounds off in a step


def test_a_second_prompt_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    """It attends to what the first one kept, and all of its own tokens stay; without position_ids they are right too."""
    model, ids = tiny_model("falcon_h1"), random_ids(2, 40)
    one, two = tiny_model("falcon_h1"), ids[:, :7].flip(1)
    compiled = simba(model, keep=0.3, min_tokens=4)

    def last(*prompts: Tensor) -> Tensor:
        cache = going_on(compiled(ids, use_cache=True))
        for prompt in prompts:
            out = compiled(prompt, **cache, use_cache=True)
        return out.logits[:, -1]

    with torch.no_grad():
        together, apart = last(two), last(*two.split(1, 1))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert "goes on from a cache" in caplog.text
    with torch.no_grad():
        dense = one(torch.cat([ids, two], 1)).logits[:, -1]
    assert not torch.allclose(dense, together, rtol=0.01)

"""Caches of keys and values that are a model's own: a step leaves out what a prompt has pruned, in whatever form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import simba
from torch import Tensor
from toys import HIDDEN, heads, matrix, tokens, toys

from simba_compile.passes import Transformed
from simba_compile.passes.attention import attention_over_cache

LENGTH = 20
TABLE = torch.rand(LENGTH + 1, HIDDEN // 2, generator=torch.Generator().manual_seed(0)) + 0.5
TURNS = torch.polar(torch.ones(LENGTH + 1, 1), 3 * TABLE[:, :1])
BOTH = torch.randn(2 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))

Cache = tuple[Tensor, ...]
Attention = Callable[[Tensor, Cache], tuple[Tensor, Cache]]  # of rows, to those in a cache too: its result, the cache then


@torch.library.custom_op("tests::as_it_is", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    """The same values, by an operation that the passes do not know."""
    return x.clone()


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def grown(cache: Cache, *new: Tensor, dim: int = 2) -> Cache:
    return tuple(torch.cat([old, rows], dim) for old, rows in zip(cache, new, strict=True)) if cache else new


def places(h: Tensor, cache: Cache) -> slice:
    """Of these rows, in tables."""
    return slice(LENGTH, None) if cache else slice(None, h.shape[1])


def parts(h: Tensor) -> Cache:
    """Keys and values, (batch, token, channel)."""
    return F.linear(h, BOTH).chunk(2, -1)


def attend(h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(h), keys, values).transpose(1, 2).flatten(2)


def keyed(made: Callable[[Tensor, slice], Tensor]) -> Attention:
    """Its keys, (batch, head, token, channel), are made so before they are cached."""

    def attention(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        keys, values = map(heads, parts(h))
        cache = grown(cache, made(keys, places(h, cache)), values)
        return attend(h, *cache), cache

    return attention


def repeated(repeat: Callable[[Tensor], Tensor]) -> Attention:
    """One head of keys and values is cached, and repeated where it is read."""

    def attention(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        cache = grown(cache, *(heads(rows)[:, :1] for rows in parts(h)))
        return attend(h, *map(repeat, cache)), cache

    return attention


def rows_apart(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, *parts(h), dim=1)
    return attend(h, *map(heads, cache)), cache


def rows_together(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, F.linear(h, BOTH), dim=1)
    return attend(h, *map(heads, cache[0].chunk(2, -1))), cache


def without_heads(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, *parts(h), dim=1)
    return F.scaled_dot_product_attention(h, *cache, torch.zeros(h.shape[1], cache[0].shape[1])), cache


def by_hand_without_heads(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    keys, values = cache = grown(cache, *parts(h), dim=1)
    return torch.bmm((torch.bmm(h, keys.transpose(1, 2)) * 0.3).softmax(-1), values), cache


def by_hand_to_columns(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    keys, values = map(heads, parts(h))
    columns = keys.transpose(2, 3)
    cache = (torch.cat([cache[0], columns], 3), torch.cat([cache[1], values], 2)) if cache else (columns, values)
    return (heads(h) @ cache[0]).softmax(-1).matmul(cache[1]).transpose(1, 2).flatten(2), cache


def scaled_where_read(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, *map(heads, parts(h)))
    return attend(h, 1.3 * cache[0], cache[1]), cache


def made_where_read(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, F.linear(h, matrix), dim=1)
    return attend(h, *map(heads, parts(cache[0]))), cache


def made_of_norms(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = grown(cache, F.rms_norm(h, (HIDDEN,)), dim=1)
    return attend(h, *map(heads, parts(cache[0]))), cache


def without_the_first(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    keys, values = grown(cache, unknown(heads(parts(h)[0])), heads(parts(h)[1]))
    return attend(h, keys, values), (keys[:, :, 1:], values[:, :, 1:])


def tokens_first(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    keys, values = map(heads, parts(h))
    cache = grown(cache, keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3), dim=0)
    return attend(h, *(rows.permute(1, 2, 0, 3) for rows in cache)), cache


def scaled_for_the_cache(h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    keys, values = map(heads, parts(h))
    keys, values = grown(tuple(rows / 2 for rows in cache), keys, values)
    return attend(h, keys, values), (2 * keys, 2 * values)


def turned(keys: Tensor, at: slice) -> Tensor:
    """The first two channels, as a complex number."""
    pairs = torch.view_as_complex(keys[..., :2].contiguous()[..., None, :]) * TURNS[at]
    return torch.cat([torch.view_as_real(pairs).flatten(3), keys[..., 2:]], -1)


PRUNED: dict[str, Attention] = {
    "keys as they are": keyed(lambda keys, at: keys),
    "by a table without sequences": keyed(lambda keys, at: keys * TABLE[at]),
    "by a table with heads": keyed(lambda keys, at: keys * TABLE[at][None, None]),
    "by complex numbers": keyed(turned),
    "of one length": keyed(lambda keys, at: F.normalize(keys, dim=-1)),
    "by what is not known": keyed(lambda keys, at: unknown(keys)),
    "detached": keyed(lambda keys, at: keys.detach()),
    "heads repeated": repeated(lambda rows: rows.repeat(1, 2, 1, 1)),
    "heads repeated, one by one": repeated(lambda rows: rows.repeat_interleave(2, 1)),
    "heads widened": repeated(lambda rows: rows.expand(-1, 2, -1, -1)),
    "heads by their numbers": repeated(lambda rows: rows[:, torch.tensor([0, 0])]),
    "parts of a chunk": rows_apart,
    "keys and values in one": rows_together,
    "without heads": without_heads,
    "by hand, without heads": by_hand_without_heads,
    "by hand, to columns": by_hand_to_columns,
    "a part of what is not known": without_the_first,
    "tokens first": tokens_first,
}
DENSE: dict[str, Attention] = {
    "scaled where they are read": scaled_where_read,
    "made where they are read": made_where_read,
    "made of norms": made_of_norms,
    "scaled for the cache": scaled_for_the_cache,
}


def prompt_and_step(attention: Attention) -> tuple[Tensor, Cache, Tensor]:
    """A prompt's results and cache, and those of attention alone in a step that goes on from the cache."""
    first, second = toys(2)

    def prompt(h: Tensor) -> tuple[Tensor, Cache]:
        h = first(h)
        attended, cache = attention(h, ())
        return second(h + attended)[:, -1:], cache

    def step(h: Tensor, *cache: Tensor) -> Tensor:
        return attention(h, cache)[0]

    h = tokens(LENGTH)
    torch._dynamo.mark_dynamic(h, 0)
    torch._dynamo.mark_dynamic(h, 1)
    with torch.no_grad():
        last, cache = simba(prompt, schedule=[0.6, 0.3], min_tokens=1, protect_first=1)(h)
        return last, cache, simba(step)(tokens(1), *cache)


@pytest.mark.parametrize("form", PRUNED)
def test_a_step_reads_what_the_prompt_has_kept(form: str, graphs: list[Transformed]) -> None:
    attention = PRUNED[form]
    _, cache, found = prompt_and_step(attention)
    assert graphs[0].pruned is not None and graphs[0].plan is not None
    assert len(graphs[0].plan.pruning) == 2
    assert attention_over_cache in [node.target for node in graphs[1].dense.graph.nodes]
    kept = []
    for part in cache:
        axis = next(axis for axis, size in enumerate(part.shape) if size > LENGTH - 2)  # the first may not be cached
        batch = 0 if axis > 0 else 1
        rows = part.movedim((batch, axis), (0, 1))
        stay = ~rows.isnan().flatten(2).any(2)
        left = 12 - LENGTH + part.shape[axis]
        assert stay.sum(1).tolist() == [left, left]
        kept.append(rows[stay].unflatten(0, (2, left)).movedim((0, 1), (batch, axis)))
    torch.testing.assert_close(found, attention(tokens(1), tuple(kept))[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", DENSE)
def test_what_a_step_could_not_tell_stays_dense(form: str, graphs: list[Transformed]) -> None:
    attention = DENSE[form]
    _, cache, found = prompt_and_step(attention)
    assert "is returned" in str([mixer.reason for mixer in graphs[0].mixers])
    assert all(part.isfinite().all() for part in cache)
    torch.testing.assert_close(found, attention(tokens(1), cache)[0].detach(), rtol=1e-5, atol=1e-6)

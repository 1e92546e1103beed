"""Each pass on a small graph of its own: match, plan, prune and restore, functional."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import eager_reference as eager
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph
from toys import HIDDEN, OPS, RANK, STATES, TAPS, WIDTH, Captured, matrix, tokens, toys

from simba_compile import Options
from simba_compile.kernels.reference import is_marked
from simba_compile.passes import prune, transform
from simba_compile.passes.functional import make_functional
from simba_compile.passes.length import FLAT, NO_TOKENS, UNCLEAR, Length
from simba_compile.passes.match import _weights, match
from simba_compile.passes.plan import make_plan, shares
from simba_compile.passes.rows import make_rows
from simba_compile.passes.tokens import suffix

# --- match and tokens ------------------------------------------------------------------------------------------------


def test_match_finds_the_mixers_and_their_parts() -> None:
    captured = Captured(toys(2), tokens())
    make_rows(captured.gm.graph)
    mixers = match(captured.gm.graph)
    assert len(mixers) == 2
    assert [mixer.reason for mixer in mixers] == [None, None]
    (first_input,) = [
        node for node in captured.gm.graph.nodes if node.op == "placeholder" and Length(mixers[0].x).of(node) == 1
    ]
    assert mixers[0].residual is first_input
    assert mixers[1].residual is mixers[0].add
    per_state = WIDTH * STATES
    for mixer, name in zip(mixers, "01", strict=True):
        assert name in mixer.path.split(".")[-1]
        assert mixer.add is not None and [scan.target for scan in mixer.scans] == [OPS.selective_scan]
        assert mixer.windows == []
        projections = HIDDEN * WIDTH + WIDTH * (RANK + 2 * STATES) + RANK * WIDTH + WIDTH * TAPS
        assert mixer.entering_flops == 2 * projections
        gate = HIDDEN * WIDTH
        assert mixer.scanned_flops == 2 * (gate + WIDTH * HIDDEN) + 7 * per_state
        assert mixer.scoring_flops == 4 * per_state


def test_match_says_what_is_missing() -> None:
    layer = toys(1)[0]
    assert match(Captured(lambda h: layer.out_proj(h @ torch.ones(HIDDEN, WIDTH)), tokens()).gm.graph) == []

    def without_residual(h: Tensor) -> Tensor:
        x = layer.in_proj(h)[..., :WIDTH]
        B = layer.x_proj(x)[..., :STATES]
        return layer.out_proj(OPS.selective_scan(x, x, layer.A, B, B, None, None, None, True, None)[0])

    (mixer,) = match(Captured(without_residual, tokens()).gm.graph)
    assert mixer.reason == "no projection and residual add follow its scan"


def test_match_counts_a_product_as_a_projection() -> None:
    """Only a linear layer's gate can be made for fewer tokens; a product's is counted for all that enter."""
    layer, weight = toys(1)[0], torch.randn(HIDDEN, 2 * WIDTH)

    def function(h: Tensor, in_proj: Callable[[Tensor], Tensor]) -> Tensor:
        x, z = in_proj(h).chunk(2, -1)
        x = OPS.causal_conv1d(x, layer.conv, None, True)
        B = layer.x_proj(x)[..., :STATES]
        return h + layer.out_proj(OPS.selective_scan(x, x, layer.A, B, B, None, z, None, True, None)[0])

    found = []
    for in_proj in (
        layer.in_proj,
        lambda h: h @ weight,
        lambda h: h @ weight.t().t(),
        lambda h: (weight.t() @ h.transpose(1, 2)).transpose(1, 2),  # the weight comes first, and is no parameter
    ):
        captured = Captured(lambda h, in_proj=in_proj: function(h, in_proj), tokens())
        found += match(captured.gm.graph)
        assert not found[-1].x.shape[1].node.shape_env.guards  # else every length would be compiled anew
    linear, *products = found
    gate = 2 * HIDDEN * WIDTH
    for product in products:
        assert product.entering_flops == linear.entering_flops + gate
        assert product.scanned_flops == linear.scanned_flops - gate


def test_match_passes_over_adds_of_the_mixers_own() -> None:
    layer = toys(1)[0]

    def function(h: Tensor) -> Tensor:
        y = layer.mixer(h)
        return h + (y + y.sigmoid())

    captured = Captured(function, tokens())
    (mixer,) = match(captured.gm.graph)
    assert mixer.add in captured.gm.graph.output_node().args[0] and mixer.reason is None
    assert mixer.residual is not None and mixer.residual.op == "placeholder"


RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda h: h * 0.5,
    "scaled by what comes first": lambda h: 0.5 * h,
    "cast": lambda h: h.double(),
    "cast and scaled": lambda h: torch.mul(h.to(torch.float64), 2),
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_match_knows_a_residual_behind_casts_and_scales(case: str) -> None:
    layer, residual = toys(1)[0], RESIDUALS[case]
    (mixer,) = match(Captured(lambda h: residual(h) + layer.mixer(h), tokens()).gm.graph)
    assert mixer.reason is None and mixer.residual is not None and mixer.residual.op != "placeholder"


def test_match_takes_a_convolution_along_the_batch_for_no_cache() -> None:
    layer = toys(1)[0]

    def function(h: Tensor) -> Tensor:
        x = OPS.causal_conv1d(F.linear(h, layer.out_proj.weight.t()).transpose(0, 1), layer.conv, None, True).transpose(0, 1)
        B = layer.x_proj(x)[..., :STATES]
        return h + layer.out_proj(OPS.selective_scan(x, x, layer.A, B, B, None, None, None, True, None)[0])

    (mixer,) = match(Captured(function, tokens()).gm.graph)
    assert mixer.reason is None


@pytest.mark.parametrize("first", [False, True])
def test_match_counts_the_parameter_where_every_size_is_known(first: bool) -> None:
    """As in a graph of one length: what the projection reads has numbers for sizes, too."""
    graph = Graph()
    weight, value = graph.placeholder("weight"), graph.placeholder("value")
    weight.meta["example_value"] = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN))
    value.meta["example_value"] = torch.randn(2, 1, HIDDEN, HIDDEN)
    product = graph.call_function(torch.matmul, (weight, value) if first else (value, weight))
    assert _weights(product) == HIDDEN * HIDDEN


def test_length_finds_the_token_axis() -> None:
    def function(h: Tensor) -> tuple[Tensor, ...]:
        return (
            h + 1,
            h.transpose(1, 2),
            h.mean(1),
            h.flatten(0, 1),
            h @ h.transpose(1, 2),
            h[:, 1:],
            h[:, -3:],
            h[:, :, 0],
            OPS.last_tokens(h, 2, 1),
            OPS.last_tokens(h, 2, 2),
            h.transpose(1, 2)[..., -4:],
            h[..., -4:, :],
            h[..., -4:],
        )

    captured = Captured(function, tokens())
    nodes = captured.gm.graph.output_node().args[0]
    (given_input,) = [
        n for n in captured.gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["example_value"], Tensor)
    ]
    length = Length(given_input.meta["example_value"])
    assert length.is_symbolic
    assert [length.of(node) for node in nodes] == [
        *(1, 2, NO_TOKENS, FLAT, UNCLEAR, UNCLEAR, NO_TOKENS, 1, NO_TOKENS, 1),
        *(NO_TOKENS, NO_TOKENS, 1),
    ]
    assert [suffix(node, length) for node in nodes] == [None] * 6 + [3, None, 2, None, 4, 4, None]


# --- plan ------------------------------------------------------------------------------------------------------------


@functools.cache
def one_mixer() -> tuple[Any, Any]:
    """A graph and its mixer."""
    graph = Captured(toys(1), tokens()).gm.graph
    return graph, match(graph)[0]


@settings(max_examples=100)
@given(
    length=st.integers(1, 3000) | st.integers(1, 10**7),
    mixers=st.integers(1, 70),
    keep=st.floats(1e-3, 1),
    kind=st.sampled_from(["linear", "uniform", "list"]),
    every=st.integers(1, 5),
    limits=st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 100)),
)
def test_counts_are_the_contracts(
    length: int, mixers: int, keep: float, kind: str, every: int, limits: tuple[int, int, int]
) -> None:
    schedule = [keep ** (i / mixers) for i in range(mixers)] if kind == "list" else kind
    names = {"protect_first": limits[0], "protect_last": limits[1], "min_tokens": limits[2]}
    given_options = {"keep": keep, "schedule": schedule, "every": every, **names}
    graph, mixer = one_mixer()
    plan = make_plan(graph, [dataclasses.replace(mixer) for _ in range(mixers)], Options.from_mapping(given_options))
    assert plan is not None
    expected = eager.counts(length, mixers, **given_options)
    assert plan.counts(length) == expected
    assert plan.inputs(length) == [expected[i] for i in plan.pruning]
    drops = [i for i, (before, after) in enumerate(zip([length, *expected], expected, strict=False)) if after < before]
    assert set(drops) <= set(plan.pruning)


def test_a_plan_without_some_mixers() -> None:
    graph, mixer = one_mixer()
    plan = make_plan(graph, [dataclasses.replace(mixer) for _ in range(4)], Options(keep=0.1, min_tokens=1))
    assert plan is not None and plan.pruning == (1, 2, 3)
    shorter = plan.without(2, "because")
    assert shorter.pruning == (1,) and shorter.counts(1000) == [1000, 700, 700, 700]
    assert [m.reason for m in plan.mixers] == [None, None, "because", "because"]


def test_shares_of_a_list_must_fit() -> None:
    assert shares(Options(schedule=[1.0, 0.5]), 2) == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"lists 2 shares.*3 mixers"):
        shares(Options(schedule=[1.0, 0.5]), 3)


def test_what_the_graph_reads_from_the_end_is_protected() -> None:
    model = toys(2)
    captured = Captured(lambda h: model(h)[:, -5:], tokens())
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), Options(protect_last=2))
    assert plan is not None and plan.protect_last == 5


# --- prune and restore -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["scan", "layer"])
def test_prune_scores_selects_and_restores(placement: str) -> None:
    captured = Captured(toys(3), tokens(40))
    options = Options(keep=0.2, placement=placement, min_tokens=1, schedule=[1.0, 0.5, 0.2])
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    assert plan is not None
    before = str(captured.gm.graph)
    pruned, _ = prune(captured.gm, plan, options)
    assert str(captured.gm.graph) == before  # the dense graph is still there
    called = captured.targets(pruned)
    assert [called.count(op) for op in (OPS.influence, OPS.select, OPS.restore, OPS.selective_scan)] == [2, 2, 1, 3]
    names = [node.name for node in pruned.graph.nodes if node.op == "placeholder"]
    assert names[-2:] == ["kept_1", "kept_2"]
    with torch.no_grad():
        result = pruned(*captured.args, 20, 8)[0]
        everything = pruned(*captured.args, 40, 40)[0]
    assert result.shape == (2, 40, HIDDEN)
    torch.testing.assert_close(everything, captured.result, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # a token that left after the first layer shows that layer's output
        first = toys(3)[0](tokens(40))
    same = (result - first).abs().amax(-1) < 1e-5
    assert same.sum(1).tolist() == ([20, 20] if placement == "scan" else [0, 0])


def test_the_length_is_read_off_an_input_where_no_number_shows_it() -> None:
    """A cache's entries are as many as the sequence has tokens."""
    first, second = toys(2)

    def with_a_cache(h: Tensor) -> tuple[Tensor, Tensor]:
        h = first(h)
        keys = h[:, None] * 2
        return second(h + F.scaled_dot_product_attention(h[:, None], keys, keys)[:, 0]), keys

    captured = Captured(with_a_cache, tokens(40))
    unused = [node for node in captured.gm.graph.find_nodes(op="placeholder") if not node.users]
    args = [value for value in captured.args if isinstance(value, Tensor)]
    assert len(unused) == len(captured.args) - len(args) > 0
    for node in unused:
        captured.gm.graph.erase_node(node)
    options = Options.from_mapping({"schedule": [0.5, 0.2], "min_tokens": 1})
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    assert plan is not None
    pruned, _ = prune(captured.gm, plan, options)
    with torch.no_grad():
        few, everything = (pruned(*args, *counts) for counts in ((20, 8), (40, 40)))
    assert [value.shape for value in few] == [(2, 40, HIDDEN), (2, 1, 40, HIDDEN)]
    assert is_marked(few[1])[..., 0].sum() == 2 * 20
    torch.testing.assert_close(everything, captured.result, rtol=1e-5, atol=1e-6)


def test_rows_that_keys_were_made_of_are_no_cache() -> None:
    """What is one axis for batch and tokens is not marked."""
    first, second = toys(2)

    def function(h: Tensor) -> tuple[Tensor, Tensor]:
        h = first(h)
        rows = F.linear(h.flatten(0, 1), matrix)
        keys = rows.view(h.shape)[:, None]
        return second(h + F.scaled_dot_product_attention(h[:, None], keys, keys)[:, 0]), rows

    captured = Captured(function, tokens(40))
    result = transform(captured.gm, Options.from_mapping({"schedule": [0.5, 0.2], "min_tokens": 1}))
    assert result.pruned is None
    assert "is returned" in str(result.mixers[0].reason)


def test_what_several_read_is_gathered_and_restored_once() -> None:
    first, second = toys(2)

    def function(h: Tensor) -> Tensor:
        other = h.sin()
        h = first(h)
        h = second(h + other) + other + other.cos()
        return h + h.cumsum(1) + h.flip(1)

    captured = Captured(function, tokens(40))
    options = Options.from_mapping({"schedule": [0.5, 0.2], "min_tokens": 1})
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    pruned, _ = prune(captured.gm, plan, options)
    called = [(node.target, node.args) for node in pruned.graph.nodes if node.target in (OPS.gather, OPS.restore)]
    assert called and len(called) == len(set(map(str, called)))
    with torch.no_grad():
        torch.testing.assert_close(pruned(*captured.args, 40, 40)[0], captured.result, rtol=1e-5, atol=1e-5)


def test_a_deep_model_is_restored_layer_by_layer() -> None:
    """Two hundred layers that norm the stream: each needs the one before it."""
    first, last = toys(2)

    def function(h: Tensor) -> Tensor:
        h = first(h)
        for _ in range(200):
            h = F.rms_norm(h + F.linear(h, matrix), (HIDDEN,))
        return last(h)

    captured = Captured(function, tokens())
    result = transform(captured.gm, Options.from_mapping({"schedule": [0.6, 0.3], "min_tokens": 1}))
    assert [mixer.reason for mixer in result.mixers] == [None, None] and result.pruned is not None
    with torch.no_grad():
        everything = result.pruned(*captured.args, 20, 20)[0]
        few = result.pruned(*captured.args, 12, 6)[0]
    torch.testing.assert_close(everything, captured.result, rtol=1e-3, atol=1e-4)
    assert few.isfinite().all() and not torch.allclose(few, everything, rtol=1e-2)


def test_nothing_is_restored_where_a_suffix_is_read() -> None:
    model = toys(2)
    captured = Captured(lambda h: model(h)[:, -2:] * 2, tokens(40))
    options = Options(keep=0.2, min_tokens=1)
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    pruned, _ = prune(captured.gm, plan, options)
    assert OPS.restore not in captured.targets(pruned) and OPS.last_tokens in captured.targets(pruned)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*captured.args, 40)[0], captured.result, rtol=1e-5, atol=1e-6)


# --- functional --------------------------------------------------------------------------------------------------------


def both(w: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A value and a view of it."""
    return w, view(w)


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], list[Any]]] = {
    "read before and after": (lambda h: (lambda w, s: (w.mul_(2), w + s)[1])(h + 1, h.sum()), ["mul"]),
    "by an operator": (lambda h: operator.itruediv(h + 1, 2), [operator.truediv]),
    "scatter": (
        lambda h: (lambda m: (m.scatter_(2, h.argmax(2, keepdim=True), 1.0), h * m)[1])(torch.zeros_like(h)),
        ["scatter"],
    ),
    "of a size": (lambda h: (lambda w: (w.mul_(2), w + 1)[1])(torch.ones(h.shape[1])), ["mul"]),
    "an input": (lambda h: h.mul_(2), ["mul_"]),
    "a view": (lambda h: (lambda w: (w[:, :3].mul_(2), w)[1])(h + 1), ["mul_"]),
    "seen through a view": (lambda h: (lambda w, v: (w.mul_(2), v + 1)[1])(*(lambda w: (w, w[:, :3]))(h + 1)), ["mul_"]),
    "another type": (lambda h: (h.half() + 1).mul_(h), ["mul_"]),
    "twice": (lambda h: (lambda w: (w.mul_(2), w.mul_(3), w + 1)[2])(h + 1), ["mul", "mul"]),
    "seen after": (lambda h: (lambda w: (lambda _, v: (w.mul_(3), v + 1)[1])(w.mul_(2), w[0]))(h + 1), ["mul", "mul_"]),
    **{
        f"seen by {name}": (lambda h, view=view: (lambda w, v: (w.mul_(2), v + 1)[1])(*both(h + 1, view)), ["mul_"])
        for name, view in {
            **{"narrow": lambda w: w.narrow(2, 0, 3), "mT": lambda w: w.mT, "select": lambda w: w.select(2, 1)},
            **{"unbind": lambda w: w.unbind(2)[1], "dropout": lambda w: F.dropout(w, training=False)},
        }.items()
    },
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_writes_on_values_of_their_own_become_ordinary(case: str) -> None:
    function, expected = IN_PLACE[case]
    h = tokens()
    captured = Captured(function, h)
    make_functional(captured.gm.graph)
    captured.gm.recompile()
    writing = {"mul", "mul_", "scatter", "scatter_", operator.truediv, operator.itruediv, operator.mul, operator.imul}
    assert [target for target in captured.targets() if target in writing][: len(expected)] == expected
    torch.testing.assert_close(captured.gm(*[x.clone() if isinstance(x, Tensor) else x for x in captured.args])[0],
                               function(tokens()) if case != "an input" else 2 * h)  # fmt: skip


def test_attention_to_something_else_runs_on_kept_tokens() -> None:
    """An encoder's states have no tokens of the sequence; a buffer of a fixed size that keys are put into has."""
    first, second = toys(2)
    states = torch.randn(1, 5, HIDDEN)

    def function(h: Tensor, fixed: bool) -> Tensor:
        h = first(h)
        buffer = torch.zeros(h.shape[0], 64, HIDDEN).index_copy(1, torch.arange(h.shape[1]), h)
        keys = buffer if fixed else states.expand(h.shape[0], -1, -1) @ matrix
        return second(h + F.scaled_dot_product_attention(h, keys, keys))

    for fixed in (False, True):
        captured = Captured(lambda h, fixed=fixed: function(h, fixed), tokens(40))
        result = transform(captured.gm, Options.from_mapping({"schedule": [0.5, 0.2], "min_tokens": 1}))
        assert (result.pruned is None) is fixed
        if result.pruned is not None:
            assert result.on_all_tokens == []
            with torch.no_grad():
                everything = result.pruned(*captured.args, 40, 40)[0]
            torch.testing.assert_close(everything, captured.result, rtol=1e-5, atol=1e-5)


def test_what_reads_keys_for_all_tokens_reads_no_marks() -> None:
    """Where they go into no cache."""
    first, second = toys(2)

    def function(h: Tensor) -> Tensor:
        h = first(h)
        keys = F.linear(h, matrix)
        return second(h + F.scaled_dot_product_attention(h, keys, keys) + keys.cumsum(1))

    captured = Captured(function, tokens(40))
    result = transform(captured.gm, Options.from_mapping({"schedule": [0.5, 0.2], "min_tokens": 1}))
    assert result.pruned is not None
    assert [name.partition("_")[0] for name in result.on_all_tokens] == ["cumsum"]
    with torch.no_grad():
        few, everything = (result.pruned(*captured.args, *counts)[0] for counts in ((20, 8), (40, 40)))
    assert few.isfinite().all()
    torch.testing.assert_close(everything, captured.result, rtol=1e-5, atol=1e-5)

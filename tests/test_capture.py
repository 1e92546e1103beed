"""Each substitute that Dynamo traces, run eagerly: it computes what the function that it stands for computes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import KEEP_FEW, close, random_ids, simba, tiny_model
from families import tiny_model as family_model
from torch._dynamo.exc import Unsupported
from torch.fx.experimental import _config as shapes
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import simba_compile
from simba_compile import capture, substitutes, symbolic_length
from simba_compile.cli.models import going_on
from simba_compile.passes import Transformed

WHOLE_MIXERS = {"mamba_inner_fn", "mamba2_split_conv1d_scan_combined"}
BATCH, CHANNELS, STATES, TOKENS, WIDTH = 2, 6, 3, 9, 4


def numbers(*shape: int) -> torch.Tensor:
    """In float32, as Hugging Face's scan computes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def cases(name: str) -> list[tuple[tuple, dict[str, Any]]]:
    """Calls of a function, as the models make them; what it writes into is made anew for each."""
    A, D, bias = -numbers(CHANNELS, STATES).exp(), numbers(CHANNELS), numbers(CHANNELS + 1)[1:]
    x, weight = numbers(BATCH, CHANNELS, TOKENS), numbers(CHANNELS, WIDTH)
    if name == "causal_conv1d_fn":
        return [((x, weight, bias, "silu"), {}), ((x, weight, None, None), {})]
    if name == "causal_conv1d_update":
        state, more, fewer = (numbers(BATCH, CHANNELS, width) for width in (WIDTH, WIDTH + 3, WIDTH - 1))
        calls = [(state, bias, "silu"), (state, None, None), (more, bias, "silu"), (fewer, bias, "silu")]
        return [((x[..., :1], window, weight, *rest), {}) for window, *rest in calls]
    if name == "mamba_selective_scan":
        B = numbers(BATCH, STATES, TOKENS)
        both = {"delta_softplus": True, "return_last_state": True}
        gated = {"D": D, "z": x.roll(1, 1), "delta_bias": bias}
        return [((x, x.cos(), A, B, B.cos()), {**both, **gated}), ((x, x.abs() / 4, A, B, B), {"D": D})]
    if name == "mamba2_chunk_scan":
        heads = numbers(BATCH, TOKENS, 4, CHANNELS), numbers(BATCH, TOKENS, 4), -numbers(4).exp()
        groups = [numbers(BATCH, TOKENS, 2, STATES)] * 2
        limited = {"D": numbers(4), "dt_bias": numbers(4), "dt_softplus": True, "dt_limit": (0.1, 0.9), "z": None}
        initial = {"initial_states": numbers(BATCH, 4, CHANNELS, STATES), "return_final_states": True}
        return [((*heads, *groups), {"chunk_size": 4, **limited, **more}) for more in ({}, initial)]
    if name == "mamba2_selective_state_update":
        state, x, groups = numbers(BATCH, 4, CHANNELS, STATES), numbers(BATCH, 4, CHANNELS), [numbers(BATCH, 2, STATES)] * 2
        A = (-numbers(4).exp())[:, None, None].expand(-1, CHANNELS, STATES)
        dt, D, bias = (numbers(*shape, 1).expand(*shape, CHANNELS) for shape in ((BATCH, 4), (4,), (4,)))
        given = {"D": D, "dt_bias": bias, "dt_softplus": True}
        small = (state[..., :1], x, dt, A[..., :1], *(value[..., :1] for value in groups))
        return [((state, x, dt, A, *groups), {**given, "z": z}) for z in (None, x.cos())] + [(small, given)]
    B, state = numbers(BATCH, STATES), numbers(BATCH, CHANNELS, STATES)
    step = x[..., 0], x[..., 1]
    return [((state, *step, A, B, B.cos()), {"D": D, "z": x[..., 2], "dt_bias": bias, "dt_softplus": True})]


def results(function: Callable, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    written = {"causal_conv1d_update": 1}.get(function.__name__, 0)
    args = tuple(value.clone() if place == written and isinstance(value, torch.Tensor) else value
                 for place, value in enumerate(args))  # fmt: skip
    out = function(*args, **kwargs)
    return [*(out if isinstance(out, tuple) else (out,)), *(value for value in args if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another backend"])
@pytest.mark.parametrize("name", sorted(set(capture.LIFTS) - WHOLE_MIXERS))
def test_a_substitute_computes_the_same(name: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_lifting", lambda: ours)
    monkeypatch.setattr(capture, "make_length_dynamic", lambda: None)
    monkeypatch.setattr(capture, "make_cache_dynamic", lambda: None)
    original = getattr(modeling_mamba2 if name.startswith("mamba2") else modeling_mamba, name)
    substitute = capture.LIFTS[name](original)
    for args, kwargs in cases(name):
        for actual, expected in zip(results(substitute, args, kwargs), results(original, args, kwargs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_function_with_other_parameters_is_not_lifted(caplog: pytest.LogCaptureFixture) -> None:
    """As a later transformers may have it: what it means is unknown, and to pass over it would be wrong in silence."""
    lifted = capture.LIFTS["causal_conv1d_fn"]

    def with_one_more(hidden_states, weight, bias=None, activation=None, dilation=1, **kwargs):  # type: ignore[no-untyped-def]
        return F.conv1d(hidden_states, weight.unsqueeze(1), bias, dilation=dilation, groups=weight.shape[0])

    def in_another_order(hidden_states, bias, weight, activation=None, **kwargs):  # type: ignore[no-untyped-def]
        return with_one_more(hidden_states, weight, bias)

    for original in (with_one_more, in_another_order):
        caplog.clear()
        assert lifted(original) is original
        assert f"{original.__name__} has other parameters" in caplog.text
    caplog.clear()
    for family, names in capture.FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in names:
            original = getattr(module, name)
            assert capture.LIFTS[name](original) is not original
    assert not caplog.text


@pytest.mark.parametrize(("states", "size"), [(1, CHANNELS), (STATES, 1), (1, 1)])
def test_a_step_of_one_state_or_one_channel_is_lifted(states: int, size: int) -> None:
    """What is repeated once has a stride like any other."""
    A = (-numbers(4).exp())[:, None, None].expand(-1, size, states)
    dt, groups = numbers(BATCH, 4, 1).expand(-1, -1, size), [numbers(BATCH, 2, states)] * 2
    state, x = numbers(BATCH, 4, size, states), numbers(BATCH, 4, size)
    assert substitutes.mamba2_selective_state_update(state, x, dt, A, *groups) is not NotImplemented
    if states > 1:  # other numbers for each
        assert substitutes.mamba2_selective_state_update(state, x, dt, A.contiguous(), *groups) is NotImplemented
    if size > 1:
        assert substitutes.mamba2_selective_state_update(state, x, dt.contiguous(), A, *groups) is NotImplemented


@pytest.mark.parametrize("config", [{"state_size": 257}, {"conv_kernel": 65}], ids=str)
def test_what_is_beyond_our_kernels_is_left_to_transformers(
    config: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    capture.warn_once.cache_clear()
    model, ids = tiny_model(layers=2, **config), random_ids(2, 80)
    compiled = simba(model, keep=1.0)
    with torch.no_grad():
        theirs, ours = model(ids, use_cache=True), compiled(ids, use_cache=True)
        close(ours.logits, theirs.logits, 1e-4)  # compiled, transformers' scan adds in another order
        close(compiled(ids[:, :1], **going_on(ours)).logits, model(ids[:, :1], **going_on(theirs)).logits, 1e-4)
    assert caplog.text.count("mamba_selective_scan is called in a way that") == ("state_size" in config)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_one_graph_serves_all_steps_of_a_hybrid(activation: str, graphs: list[Transformed]) -> None:
    """Whatever follows its convolution, which with another activation is none of ours."""
    model = family_model("bamba", hidden_act=activation)
    model.compile(backend="simba", options=KEEP_FEW)
    model.generate(random_ids(2, 40), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(graphs) == 2


@pytest.mark.parametrize("tokens", [1, 7])
def test_further_batch_sizes_share_the_graph_of_the_second_one(tokens: int, graphs: list[Transformed]) -> None:
    """Also where a cache of attention is read, by a step or by a second part of the prompt."""
    model = family_model("bamba", num_hidden_layers=2, attn_layer_indices=[1])
    model.compile(backend="simba", options=KEEP_FEW)
    for batch in (2, 3, 4, 5):
        ids = random_ids(batch, 20 + tokens)
        with torch.no_grad():
            model(ids[:, 20:], **going_on(model(ids[:, :20], use_cache=True)))
    assert len(graphs) == 3  # one for prompts, and two for what follows them: of the first batch size and of all


@pytest.mark.parametrize("packed", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("name", ["causal_conv1d_fn", "mamba_selective_scan", "mamba2_chunk_scan"])
def test_sequences_packed_into_one_row_are_left_to_transformers(name: str, packed: str) -> None:
    """Our operators do not keep them apart; transformers does with mamba-ssm's kernels, and says so without them."""
    for args, kwargs in cases(name):
        assert getattr(substitutes, name)(*args, **kwargs, **{packed: None}) is not NotImplemented
        assert getattr(substitutes, name)(*args, **kwargs, **{packed: torch.zeros(BATCH, TOKENS)}) is NotImplemented


def test_the_fused_kernel_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face then takes the path through the functions above."""
    substitute = capture.LIFTS["mamba_inner_fn"](lambda *args, **kwargs: "fused")
    monkeypatch.setattr(capture, "_lifting", lambda: True)
    assert substitute(1, a=2) is None
    monkeypatch.setattr(capture, "_lifting", lambda: False)
    assert substitute(1, a=2) == "fused"


@pytest.mark.parametrize("ours", [True, False])
def test_marks_around_experts_change_nothing(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_lifting", lambda: ours)
    module, rows, index, weights = object(), numbers(4, 3), torch.arange(4)[:, None], numbers(4, 1)
    given = []

    def experts(*args: Any) -> torch.Tensor:
        given.extend(args)
        return rows[index[:, 0]] * weights

    result = capture._mark_experts(experts)(module, rows, index, weights)
    assert torch.equal(result, rows * weights) and given[0] is module
    assert all(torch.equal(*pair) for pair in zip(given[1:], (rows, index, weights), strict=True))
    assert (given[1] is rows) is not ours  # else between the marks


def test_parameters_are_no_inputs_of_a_varying_length() -> None:
    ids, weight = torch.zeros(2, 3), torch.nn.Parameter(numbers(4, 3))
    given = {"ids": ids, "weight": weight, "more": {"mask": ids}, "pair": (weight, [ids]), "cache": object(), "name": "x"}
    found = symbolic_length._tensors(types.SimpleNamespace(f_locals=given))
    assert [*found] == ["L['ids']", "L['more']['mask']", "L['pair'][1][0]"]
    assert all(value is ids for value in found.values())


def test_one_graph_serves_every_batch_of_lengths_and_labels(graphs: list[Transformed], selected: list[torch.Tensor]) -> None:
    """Inputs of one axis: a number for each sequence. One that is fixed would fix the batch."""
    model = tiny_model(layers=2).backbone

    def loss(ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first = ids.shape[1] - lengths
        mask = torch.arange(ids.shape[1])[None] >= first[:, None]
        last = model(ids, attention_mask=mask.long()).last_hidden_state[:, -1]
        return torch.nn.functional.cross_entropy(last, labels)

    run = simba(loss, **KEEP_FEW)
    with torch.no_grad():
        for batch, length in ((2, 50), (3, 60), (5, 41)):
            run(random_ids(batch, length), torch.arange(batch) + 30, torch.arange(batch))
    assert len(graphs) == 1 and len(selected) == 3


def test_one_graph_serves_every_number_of_labels(graphs: list[Transformed], selected: list[torch.Tensor]) -> None:
    """They say how many of the last tokens are read, and Dynamo looks at them only after the mixers."""
    model = tiny_model(layers=2)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(ids, logits_to_keep=labels.shape[1]).logits
        return torch.nn.functional.cross_entropy(logits.mT, labels)

    run = simba(loss, **KEEP_FEW | {"keep": 0.05})
    with torch.no_grad():
        for count in (5, 6, 9, 4):
            run(random_ids(2, 50), random_ids(2, count))
    assert len(graphs) == 2 and [kept.shape[1] for kept in selected] == [5, 6, 9, 4]


def test_one_more_than_the_labels_is_a_number_of_its_graph(graphs: list[Transformed], selected: list[torch.Tensor]) -> None:
    model = tiny_model(layers=2).backbone

    def last(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(ids).last_hidden_state[:, -labels.shape[1] - 1 :]

    run = simba(last, **KEEP_FEW | {"keep": 0.05})
    with torch.no_grad():
        for count in (5, 6, 9):
            assert run(random_ids(2, 50), random_ids(2, count)).shape[1] == count + 1
    assert [kept.shape[1] for kept in selected] == [6, 7, 10]
    for graph in graphs:
        assert graph.pruned is not None
        assert torch.ops.simba.restore not in [node.target for node in graph.pruned.graph.nodes]


def test_explain_reads_off_how_many_tokens_are_read() -> None:
    model = tiny_model(layers=2).backbone

    def last(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(ids).last_hidden_state[:, -labels.shape[1] :]

    torch._dynamo.mark_dynamic(labels := random_ids(2, 9), 1)
    report = simba_compile.explain(last, random_ids(2, 50), labels, options=KEEP_FEW | {"keep": 0.05})
    assert [row.tokens_out for row in report.mixers] == [50, 9]


def test_a_trace_that_fails_leaves_nothing_behind() -> None:
    """Batch and length are equal, for which the trace has Dynamo tell them apart."""
    model = tiny_model(layers=1).backbone

    def breaks(ids: torch.Tensor) -> torch.Tensor:
        hidden = model(ids).last_hidden_state
        torch._dynamo.graph_break()
        return hidden

    with pytest.raises(Unsupported):
        simba(breaks, **KEEP_FEW)(random_ids(40, 40))
    assert shapes.use_duck_shape
    assert not symbolic_length._undo


def _as_the_hub_does(function: Callable) -> torch.nn.Module:
    """How the package `kernels` wraps a function that it may exchange."""

    class Func(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    func = function
    return Func()


@pytest.mark.parametrize("installed", ["mamba-ssm", "kernels"])
def test_installed_kernels_are_lifted_too(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers found kernels when it was imported, our operators still stand in their place."""
    from transformers.integrations import use_kernel_func_from_hub_with_fallback

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("another package's kernel was called")

    package = types.ModuleType("mamba_ssm_of_a_test")
    package.__dict__.update(dict.fromkeys(capture.FAMILIES["mamba"], never))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name in capture.FAMILIES["mamba"]:
        function = capture._copy(getattr(modeling_mamba, name))
        if installed == "kernels":
            monkeypatch.setattr(modeling_mamba, name, _as_the_hub_does(function))
        else:
            wrap = use_kernel_func_from_hub_with_fallback(name, package.__name__)
            monkeypatch.setattr(modeling_mamba, name, wrap(function))
    lifts = {name: capture.LIFTS[name] for name in capture.FAMILIES["mamba"]}
    capture._substitute(modeling_mamba.__name__, lifts)
    model, ids = tiny_model(layers=2, hidden_size=8, state_size=4), random_ids(2, 40)
    with torch.no_grad():
        report = simba_compile.explain(model, ids, options=KEEP_FEW).to_dict()
        compiled = simba(model, **KEEP_FEW)
        out = compiled(ids, use_cache=True)
        assert compiled(ids[:, :1], **going_on(out), use_cache=True).logits.isfinite().all()
    assert [(mixer["tokens_in"], mixer["tokens_out"]) for mixer in report["mixers"]] == [(40, 40), (40, 8)]

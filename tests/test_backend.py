"""End to end: ``torch.compile(model, backend="simba")`` against the contract in plain eager PyTorch."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FAMILIES,
    KEEP_FEW,
    SELECTING,
    VOCABULARY,
    assert_as_contracted,
    cache_of,
    close,
    conv_states,
    each_family,
    left_padding,
    original_places,
    pruned_exactly,
    random_ids,
    simba,
    ssm_states,
    tiny_model,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from torch.fx import Graph, GraphModule
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import simba_compile.backend
from simba_compile.backend import compile_inner
from simba_compile.eager import with_room
from simba_compile.passes import Transformed

# --- against the eager reference -------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "linear": {"keep": 0.2, "min_tokens": 1},
    "defaults": {},
    "uniform schedule": {"keep": 0.4, "schedule": "uniform", "min_tokens": 4},
    "list": {"schedule": [0.9, 0.9, 0.15], "min_tokens": 1},
    "every 2": {"keep": 0.1, "every": 2, "min_tokens": 1},
    "every 3, uniform": {"keep": 0.3, "every": 3, "schedule": "uniform", "min_tokens": 1},
    "layer": {"keep": 0.2, "placement": "layer", "min_tokens": 4},
    "layer, uniform, l2": {"keep": 0.3, "placement": "layer", "schedule": "uniform", "pool": "l2", "min_tokens": 4},
    "recent": {"keep": 0.2, "criterion": "recent", "min_tokens": 1},
    "evenly spaced": {"keep": 0.2, "criterion": "uniform", "min_tokens": 1},
    "evenly spaced, layer": {"keep": 0.2, "criterion": "uniform", "placement": "layer", "min_tokens": 1},
    "absmax": {"keep": 0.2, "pool": "absmax", "min_tokens": 1},
    "l2, exclude": {"keep": 0.2, "pool": "l2", "dt_bias": "exclude", "min_tokens": 1},
    "exclude": {"keep": 0.2, "dt_bias": "exclude", "min_tokens": 1},
    "ends": {"keep": 0.1, "protect_first": 5, "protect_last": 7, "min_tokens": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, selected: list[Tensor]) -> None:
    """The same graph serves two lengths. The cases take turns at the families and at padding on the left."""
    options, turn = CASES[case], list(CASES).index(case)
    family, padded = sorted(FAMILIES)[turn % 2], turn // 2 % 2 == 0
    model = tiny_model(family, torch.float64, layers=3)
    compiled = simba(model, **options)
    for batch, length in ((2, 57), (3, 80)):
        mask = left_padding(batch, length) if padded else None
        assert_as_contracted(compiled, model, random_ids(batch, length), mask, selected, **options)
    assert selected


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # shrinking would compile for minutes
@given(data=st.data())
def test_equals_the_reference_on_random_models_and_options(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4))
    shares = sorted((data.draw(st.floats(0.05, 1)) for _ in range(layers)), reverse=True)
    options = {
        "keep": data.draw(st.floats(0.05, 1)),
        "schedule": data.draw(st.sampled_from(["linear", "uniform", shares])),
        "every": data.draw(st.integers(1, 3)),
        "criterion": data.draw(st.sampled_from(["influence", "influence", "influence", "recent", "uniform"])),
        "pool": data.draw(st.sampled_from(["max", "absmax", "l2"])),
        "dt_bias": data.draw(st.sampled_from(["include", "exclude"])),
        "placement": data.draw(st.sampled_from(["scan", "layer"])),
        "protect_first": data.draw(st.integers(0, 6)),
        "protect_last": data.draw(st.integers(1, 6)),
        "min_tokens": data.draw(st.integers(1, 40)),
    }
    family, seed = data.draw(st.sampled_from(sorted(FAMILIES))), data.draw(st.integers(0, 99))
    model = tiny_model(family, torch.float64, layers=layers, seed=seed)
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(5, 70))
    ids, mask = random_ids(batch, length, seed), left_padding(batch, length) if data.draw(st.booleans()) else None
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        chosen: list[Tensor] = []
        original = SELECTING.select
        patch.setattr(SELECTING, "select", lambda *args: chosen.append(original(*args)) or chosen[-1])
        assert_as_contracted(simba(model, **options), model, ids, mask, chosen, **options)


def test_residual_in_float32_and_half_weights_stay_near_the_reference(selected: list[Tensor]) -> None:
    """A float32 model keeps the same tokens as the reference in float32, and has its logits."""
    model = tiny_model()
    with torch.no_grad():
        out = simba(model, **KEEP_FEW)(random_ids(2, 60))
        expected = pruned_exactly(model, random_ids(2, 60), **KEEP_FEW)
    assert original_places(selected, 60)[-1] == expected.kept[-1].tolist()
    close(out.logits, expected.logits, 1e-4)


@pytest.mark.parametrize("count", [1, 5])
@each_family
def test_logits_to_keep_restores_nothing(family: str, count: int, graphs: list[Transformed], selected: list[Tensor]) -> None:
    model = tiny_model(family, torch.float64)
    with torch.no_grad():
        out = simba(model, keep=0.1, min_tokens=1)(random_ids(2, 60), logits_to_keep=count, use_cache=True)
        expected = pruned_exactly(model, random_ids(2, 60), logits_to_keep=count, keep=0.1, min_tokens=1)
    assert out.logits.shape == (2, count, VOCABULARY)
    close(out.logits, expected.logits, 1e-6)
    for actual, wanted in zip(ssm_states(cache_of(out)), expected.ssm_states, strict=True):
        close(actual, wanted, 1e-11)
    assert original_places(selected, 60)[-1] == expected.kept[-1].tolist()
    (graph,) = graphs
    assert graph.pruned is not None
    assert torch.ops.simba.restore not in [node.target for node in graph.pruned.graph.nodes]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@each_family
def test_one_graph_serves_every_number_of_logits(family: str, inner: str, graphs: list[Transformed]) -> None:
    """And what it protects is what each call reads. One more where all are read, and one where more are asked for."""
    model = tiny_model(family, torch.float64)
    run = simba(model, keep=0.1, min_tokens=1, inner=inner)
    made = []
    for length, count in ((60, 5), (61, 7), (50, 2), (40, 39), (70, 12), (45, 45), (44, 60), (43, 43)):
        ids = random_ids(2, length)
        with torch.no_grad():
            out = run(ids, logits_to_keep=count, use_cache=False)
            expected = pruned_exactly(model, ids, logits_to_keep=count, keep=0.1, min_tokens=1)
        close(out.logits, expected.logits, 1e-6)
        made.append(len(graphs))
    assert made == [1, 2, 2, 2, 2, 3, 4, 4]


@each_family
def test_all_logits_are_computed_once(family: str, graphs: list[Transformed]) -> None:
    """Not for the kept tokens, too, whose hidden states are restored first. (In float32 no cast comes after the head.)"""
    with torch.no_grad():
        simba(tiny_model(family, torch.bfloat16), **KEEP_FEW)(random_ids(2, 50))
    pruned = graphs[0].pruned
    assert pruned is not None
    made = [node.args[1].name for node in pruned.graph.nodes if node.target in (torch.ops.simba.linear, F.linear)]  # type: ignore[union-attr]
    assert sum("embeddings" in name or "lm_head" in name for name in made) == 1


def test_random_criterion_follows_its_seed() -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    outputs = []
    for seed in (1, 1, 2):
        torch._dynamo.reset()
        with torch.no_grad():
            outputs.append(simba(model, criterion="random", seed=seed, **KEEP_FEW)(random_ids(2, 50)).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# --- keep=1.0 is the dense model -------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_keep_everything_is_hugging_face(family: str, dtype: torch.dtype, selected: list[Tensor]) -> None:
    model = tiny_model(family, dtype)
    ids, mask = random_ids(2, 40), left_padding(2, 40)
    exact_model = tiny_model(family, torch.float64)
    exact_model.load_state_dict(model.state_dict())
    everything = {"attention_mask": mask, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        exact, dense = exact_model(ids, **everything), model(ids, **everything)
        out = simba(model, keep=1.0)(ids, **everything)

    def values(output: Any) -> list[Tensor]:
        cache = cache_of(output)
        return [output.logits, *output.hidden_states, *conv_states(cache), *ssm_states(cache)]

    close(out.hidden_states[0], dense.hidden_states[0], 6 * torch.finfo(dtype).eps + 1e-6)
    for ours, theirs, right in zip(values(out), values(dense), values(exact), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # Later layers magnify what the first ones round, a single token of these random models up to tenfold in either
        # direction: so the typical token is compared, not the sum over all of them.
        rounding = (theirs.double() - right).norm(dim=-1).median()
        assert (ours.double() - right).norm(dim=-1).median() <= 1.5 * rounding + 1e-5 * right.norm(dim=-1).median()
        if dtype in (torch.float32, torch.float64):
            close(ours, theirs, 2e-5)
    assert not selected


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_one_graph_for_all_lengths_and_one_more_for_a_single_sequence(
    graphs: list[Transformed], selected: list[Tensor]
) -> None:
    model = tiny_model(dtype=torch.float64, layers=3)
    compiled = simba(model, **KEEP_FEW)
    assert_as_contracted(compiled, model, random_ids(2, 33), None, selected, **KEEP_FEW)
    assert selected  # the very first call is pruned
    for batch, length in ((2, 60), (5, 91), (3, 34), (2, 8)):
        assert_as_contracted(compiled, model, random_ids(batch, length), None, selected, **KEEP_FEW)
    assert len(graphs) == 1
    for length in (44, 60, 91):
        assert_as_contracted(compiled, model, random_ids(1, length), None, selected, **KEEP_FEW)
        assert selected
    assert len(graphs) == 2
    assert all(graph.pruned is not None for graph in graphs)


def test_a_single_sequence_first(graphs: list[Transformed], selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(model, **KEEP_FEW)
    for batch, length in ((1, 44), (1, 60), (2, 60), (3, 50)):
        assert_as_contracted(compiled, model, random_ids(batch, length), None, selected, **KEEP_FEW)
        assert selected
    assert len(graphs) == 2


def test_dynamic_true(graphs: list[Transformed], selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(model, dynamic=True, **KEEP_FEW)
    for length in (44, 60):
        assert_as_contracted(compiled, model, random_ids(2, length), None, selected, **KEEP_FEW)
        assert selected
    assert len(graphs) == 1


def test_dynamic_false_stays_dense_and_says_so(
    graphs: list[Transformed], selected: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(layers=2)
    with caplog.at_level(logging.WARNING, "simba_compile"), torch.no_grad():
        out = simba(model, dynamic=False, **KEEP_FEW)(random_ids(2, 44)).logits
    close(out, model(random_ids(2, 44)).logits, 2e-5)
    assert not selected
    assert "dense" in caplog.text and "fixed at 44" in caplog.text
    assert graphs[0].pruned is None and all(mixer.reason for mixer in graphs[0].mixers)


PRUNING: dict[str, tuple[dict[str, Any], bool]] = {
    "keep": ({"keep": 0.3}, True),
    "shares": ({"schedule": [1.0, 0.3]}, True),
    "keep all": ({"keep": 1.0}, False),
    "shares of one": ({"schedule": [1.0, 1.0]}, False),
}


@pytest.mark.parametrize("name", PRUNING)
def test_a_prompt_shorter_than_the_convolution_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where pruning was asked for."""
    options, asked = PRUNING[name]
    model = tiny_model(layers=2)
    ids = random_ids(2, model.config.conv_kernel - 1)
    with caplog.at_level(logging.WARNING, "simba_compile"), torch.no_grad():
        out = simba(model, min_tokens=1, **options)(ids, use_cache=True).logits
    close(out, model(ids).logits, 2e-5)
    assert ("the prompt is shorter than the convolution" in caplog.text) == asked
    assert asked or not caplog.records


@pytest.mark.parametrize("way", ["forward", "method", "function", "no fullgraph"])
def test_every_way_to_compile(way: str, selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    plain = copy.deepcopy(model)
    if way == "forward":
        compiled = simba(model.forward, **KEEP_FEW)
    elif way == "method":
        model.compile(backend="simba", fullgraph=True, options=KEEP_FEW)
        compiled = model
    elif way == "function":
        compiled = simba(lambda ids, **kwargs: model(ids, **kwargs), **KEEP_FEW)
    else:
        compiled = simba(model, fullgraph=False, **KEEP_FEW)
    assert_as_contracted(compiled, plain, random_ids(2, 50), None, selected, **KEEP_FEW)
    assert selected


OTHERS = """
import sys
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
config = MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=32)
model = MambaForCausalLM(config).eval()
ids = torch.arange(12).view(2, 6) % 32


def graphs(*inputs):
    found = []

    def backend(gm, example_inputs):
        place = {node: i for i, node in enumerate(gm.graph.nodes)}  # names aside: Dynamo picks them by its own record
        each = []
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            shape = str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value)
            args = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: f"%{place[source]}")
            each.append(f"{node.op} {shape} {args} " + (str(node.target) if node.op != "output" else ""))
        found.append("\\n".join(each))
        return gm.forward

    with torch.no_grad():
        results = [torch.compile(model, backend=backend)(value).logits for value in inputs]
    return found, results


def inductor():
    with torch.no_grad():
        return torch.compile(model, backend="inductor")(ids[:, :4]).logits


before = graphs(ids, ids[:, :5], ids)  # one static graph, then one for all lengths
torch._dynamo.reset()
compiled_before = inductor()
torch._dynamo.reset()
assert "simba_compile" not in sys.modules
with torch.no_grad():
    torch.compile(model, backend="simba", options={"keep": 0.5, "min_tokens": 1})(ids)
assert "simba_compile" in sys.modules
first = graphs(ids)  # no reset: what Dynamo remembers of our compilation must not show
assert first[0] == before[0][:1], "the graph after ours differs"
torch._dynamo.reset()
after = graphs(ids, ids[:, :5], ids)
assert after[0] == before[0], "graphs of another backend differ"
assert "simba" not in "".join(after[0])
assert all(torch.equal(a, b) for a, b in zip(before[1], after[1]))
torch._dynamo.reset()
assert torch.equal(inductor(), compiled_before), "Inductor's results differ"
print("unchanged", len(before[0]))
"""


def test_other_backends_see_the_graphs_that_they_always_saw() -> None:
    """In a process of its own, where nothing of ours is loaded at first."""
    run = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "unchanged" in run.stdout


# --- other models, several models, changed weights -------------------------------------------------------------------


def test_models_without_a_mixer_are_as_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    caplog.set_level(logging.INFO, "simba_compile")
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    llama = LlamaForCausalLM(config).eval()
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        for length in (20, 45):
            ids = random_ids(2, length)
            close(simba(llama, fullgraph=False)(ids).logits, llama(ids).logits, 1e-6)
    assert "Nothing to prune in this graph" in caplog.text
    out = simba(layers)(x)
    close(out, layers(x), 1e-6)
    (grad,) = torch.autograd.grad(out.sum(), x)
    close(grad, torch.autograd.grad(layers(x).sum(), x)[0], 1e-6)

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (a + b).cumsum(1).flip(1), a.mean(1)

    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    for ours, theirs in zip(simba(function)(a, b), function(a, b), strict=True):
        close(ours, theirs, 1e-6)


def test_two_models_with_options_of_their_own(selected: list[Tensor]) -> None:
    models = [tiny_model("mamba", torch.float64, layers=2), tiny_model("mamba", torch.float64, layers=2, seed=5)]
    chosen = [{"keep": 0.2, "min_tokens": 1}, {"keep": 0.6, "min_tokens": 1, "placement": "layer", "pool": "l2"}]
    compiled = [simba(model, **options) for model, options in zip(models, chosen, strict=True)]
    for _ in range(2):
        for call, model, options in zip(compiled, models, chosen, strict=True):
            assert_as_contracted(call, model, random_ids(2, 50), None, selected, **options)
    both = [simba(models[0], **options) for options in chosen]  # one model, compiled twice
    for call, options in zip(both, chosen, strict=True):
        assert_as_contracted(call, models[0], random_ids(2, 50), None, selected, **options)


def test_changed_weights_are_seen(selected: list[Tensor]) -> None:
    model, other = tiny_model(dtype=torch.float64, layers=2), tiny_model(dtype=torch.float64, layers=2, seed=7)
    compiled = simba(model, **KEEP_FEW)
    first = assert_as_contracted(compiled, model, random_ids(2, 50), None, selected, **KEEP_FEW)
    model.load_state_dict(other.state_dict())
    second = assert_as_contracted(compiled, other, random_ids(2, 50), None, selected, **KEEP_FEW)
    assert not torch.allclose(first.logits, second.logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_as_contracted(compiled, model, random_ids(2, 50), None, selected, **KEEP_FEW)


@each_family
def test_a_checkpoint_from_disk(family: str, tmp_path: Any, selected: list[Tensor]) -> None:
    saved = tiny_model(family, layers=2)
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = simba(model, **KEEP_FEW)(random_ids(2, 50))
        close(out.logits, pruned_exactly(saved, random_ids(2, 50), **KEEP_FEW).logits, 1e-4)
    assert selected


def test_inputs_are_left_as_they_were(selected: list[Tensor]) -> None:
    """The fused residual adds write in place, but never into what the caller holds."""
    model = tiny_model(layers=3)
    embedded = model.backbone.embeddings(random_ids(2, 50)).detach().clone()
    weights = copy.deepcopy(model.state_dict())
    before = embedded.clone()
    compiled = simba(model, schedule="uniform", **KEEP_FEW)
    with torch.no_grad():
        first = compiled(inputs_embeds=embedded).logits
        assert torch.equal(compiled(inputs_embeds=embedded).logits, first)
    assert selected
    assert torch.equal(embedded, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python keeps frames elsewhere")
def test_what_a_graph_calls_finds_room_for_its_frames_at_any_depth() -> None:
    resource = pytest.importorskip("resource")

    def inner(value: int) -> int:
        return value

    def operation(value: int) -> int:
        return inner(value)

    steps = "\n".join(f"    v{i} = operation({i})" for i in range(300))
    scope: dict[str, Any] = {"operation": operation}
    exec(f"def graph():\n{steps}", scope)

    def page_faults(call: Callable[[], object], depth: int) -> int:
        if depth > 0:
            return page_faults(call, depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def most(call: Callable[[], object]) -> int:
        return max(page_faults(call, depth) for depth in range(250))

    assert most(with_room(scope["graph"])) < 100 < 300 <= most(scope["graph"])


def test_inductor_takes_nothing_from_its_cache_that_other_operators_left(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((graph.call_function(torch.ops.simba.causal_conv1d, (x, weight, None, True)),))
    gm, args = GraphModule({}, graph), (torch.randn(2, 9, 6), torch.randn(6, 4))

    def found_in_cache() -> bool:
        torch._dynamo.reset()
        counters.clear()
        compile_inner(gm, "inductor")(*args)
        counted = counters["aot_autograd"]
        assert counted["autograd_cache_hit"] + counted["autograd_cache_miss"] == 1
        return counted["autograd_cache_hit"] == 1

    tag = torch.compiler.config.cache_key_tag
    with fresh_inductor_cache():
        assert [found_in_cache(), found_in_cache()] == [False, True]
        monkeypatch.setattr(simba_compile.backend, "kernels_digest", lambda: "of another version")
        assert [found_in_cache(), found_in_cache()] == [False, True]
    assert torch.compiler.config.cache_key_tag == tag

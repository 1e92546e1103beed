"""Models that Dynamo breaks into several graphs: they prune as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from conftest import KEEP_FEW, close, pruned_exactly, random_ids, tiny_model
from test_life_cycle import logits, process_group
from torch import Tensor, nn
from transformers import MambaForCausalLM

import simba_compile
from simba_compile import capture
from simba_compile.passes import Transformed

LENGTH = 40


@pytest.fixture(autouse=True)
def told_nothing() -> None:
    """A reason is told once in a process."""
    capture.warn_once.cache_clear()


@pytest.fixture
def model() -> MambaForCausalLM:
    return tiny_model(layers=3)


def compiled(function: Callable, **options: object) -> Callable:
    return torch.compile(function, backend="simba", options={**KEEP_FEW, **options})


# --- between the layers of a stack: all stay dense --------------------------------------------------------------------


def disable_a_norm(layers: nn.ModuleList) -> None:
    layers[1].norm.forward = torch.compiler.disable(layers[1].norm.forward)


def hook_each(layers: nn.ModuleList) -> None:
    for layer in layers:
        layer.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))


def dispatch_each(layers: nn.ModuleList) -> None:
    """As where ``device_map`` puts layers on several devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu", io_same_device=True))


def shard(module: nn.Module) -> None:
    torch.distributed.fsdp.fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))


def shard_each(layers: nn.ModuleList) -> None:
    for layer in layers:
        shard(layer)


def test_a_break_inside_a_mixer_is_named(model: MambaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    """As adapters have it that Dynamo cannot trace (peft's DoRA): what is left of the mixer has no projection before it."""
    expected = logits(model, LENGTH)
    for layer in model.backbone.layers:
        layer.mixer.in_proj.forward = torch.compiler.disable(layer.mixer.in_proj.forward)
    with caplog.at_level("WARNING", "simba_compile"):
        close(logits(compiled(model), LENGTH), expected, 1e-4)
    told = {record.message for record in caplog.records if record.name == "simba_compile"}
    assert told and all("; Dynamo broke the graph inside this mixer (TORCH_LOGS=graph_breaks" in message for message in told)


def test_a_mixer_that_dynamo_leaves_out_is_named(graphs: list[Transformed], caplog: pytest.LogCaptureFixture) -> None:
    """After an error in it, such as for ids without a batch axis, Dynamo leaves a function as it is; and what calls it."""
    of_mamba2 = families.tiny_model("mamba2")
    run = compiled(of_mamba2)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        run(random_ids(1, LENGTH)[0])
    expected = logits(of_mamba2, LENGTH)
    with caplog.at_level("WARNING", "simba_compile"):
        close(logits(run, LENGTH), expected, 1e-4)
    (told,) = [record.message for record in caplog.records if record.name == "simba_compile"]
    assert told.startswith("Dense: Mamba2Mixer.forward runs uncompiled.")
    torch._dynamo.reset()
    graphs.clear()
    logits(run, LENGTH)
    assert [graph.pruned is not None for graph in graphs] == [True]


@pytest.mark.parametrize("way", [disable_a_norm, hook_each, dispatch_each, shard_each])
def test_layers_in_graphs_of_their_own_are_dense_and_say_so(
    way: Callable, model: MambaForCausalLM, tmp_path: Path, graphs: list[Transformed], caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(model, LENGTH)
    with process_group(tmp_path), caplog.at_level("WARNING", "simba_compile"):
        way(model.backbone.layers)
        found = logits(compiled(model), LENGTH)
    close(found, expected, 1e-4)
    assert sum(len(graph.mixers) for graph in graphs) >= 2 and not any(graph.plan for graph in graphs)
    told = [record.message for record in caplog.records if record.name == "simba_compile"]
    assert len(told) == 1
    assert "Dynamo broke the graph between the 3 mixers of" in told[0]
    assert "backbone.layers, and has 1 in this one" in told[0]


def test_explain_says_so(model: MambaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    """Shares that are given for each mixer are not counted in a part; of a decoding step there is nothing to say."""
    hook_each(model.backbone.layers)
    options = {"schedule": [1.0, 0.6, 0.2], "min_tokens": 4}
    with torch.no_grad():
        report = simba_compile.explain(model, random_ids(2, LENGTH), options=options)
        assert [mixer.tokens_out for mixer in report.mixers] == [LENGTH] * 3 and report.graphs > 3
        assert all("Dynamo broke the graph between the 3 mixers" in str(mixer.reason) for mixer in report.mixers)
        caplog.clear()
        simba_compile.explain(model, random_ids(2, 1), options=options)
    assert not [record for record in caplog.records if record.name == "simba_compile"]


class Halves(nn.Module):
    """Its own code, and not a loop, has a break between two layers: Dynamo goes on behind it. Not all have mixers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*layers, nn.Identity()])

    def forward(self, h: Tensor) -> Tensor:
        h = self.layers[1](self.layers[0](h))
        torch._dynamo.graph_break()
        return self.layers[3](self.layers[2](h))


def test_a_break_between_two_calls(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    halves, h = Halves(model.backbone.layers), torch.randn(2, LENGTH, model.config.hidden_size)
    with torch.no_grad():
        close(compiled(halves)(h), halves(h), 1e-4)
    assert [len(graph.mixers) for graph in graphs] == [2, 1] and not any(graph.plan for graph in graphs)
    assert all("the 3 mixers of Halves.layers" in str(mixer.reason) for graph in graphs for mixer in graph.mixers)


# --- elsewhere: the stack prunes as a whole ---------------------------------------------------------------------------


def test_breaks_around_a_model(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    def around(ids: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out = model(ids).logits
        torch._dynamo.graph_break()
        return out * 1

    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        found = compiled(around)(ids)
    close(found, pruned_exactly(model, ids, **KEEP_FEW).logits, 1e-4)
    assert [len(graph.plan.pruning) for graph in graphs if graph.plan] == [2]


def test_a_break_in_a_model_before_its_layers(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    embed, ids = model.backbone.embeddings, random_ids(2, LENGTH)
    expected = pruned_exactly(model, ids, **KEEP_FEW).logits
    embed.forward = torch.compiler.disable(embed.forward)
    with torch.no_grad():
        close(compiled(model)(ids).logits, expected, 1e-4)
    assert [len(graph.plan.pruning) for graph in graphs if graph.plan] == [2]


def test_a_model_that_is_sharded_as_a_whole(model: MambaForCausalLM, tmp_path: Path, graphs: list[Transformed]) -> None:
    ids = random_ids(2, LENGTH)
    expected = pruned_exactly(model, ids, **KEEP_FEW).logits
    with process_group(tmp_path), torch.no_grad():
        shard(model)
        close(compiled(model)(ids).logits, expected, 1e-4)
    assert [len(graph.plan.pruning) for graph in graphs if graph.plan] == [2]


def test_a_model_that_leaves_layers_out(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    """All in one graph: what it does not call is not missing."""

    def first_two(h: Tensor) -> Tensor:
        for layer in model.backbone.layers[:2]:
            h = layer(h)
        return h

    with torch.no_grad():
        compiled(first_two)(torch.randn(2, LENGTH, model.config.hidden_size))
    assert [len(graph.mixers) for graph in graphs if graph.plan] == [2]


class FirstTwo(nn.Module):
    """Its own code has a break before its layers, of which it leaves one out."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.layers[1](self.layers[0](h))


def test_a_model_that_leaves_layers_out_behind_a_break(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    with torch.no_grad():
        compiled(FirstTwo(model.backbone.layers))(torch.randn(2, LENGTH, model.config.hidden_size))
    assert [len(graph.mixers) for graph in graphs if graph.plan] == [2]


def test_a_model_that_shares_layers_with_a_broken_one(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    halves, h = Halves(model.backbone.layers), torch.randn(2, LENGTH, model.config.hidden_size)
    with torch.no_grad():
        compiled(halves)(h)
        assert not any(graph.plan for graph in graphs)
        compiled(FirstTwo(halves.layers))(h)
    assert [len(graph.mixers) for graph in graphs if graph.plan] == [2]


def test_a_layer_that_is_compiled_alone(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    """What was asked for is a schedule for this layer."""
    model.backbone.layers[1].compile(backend="simba", options=KEEP_FEW)
    logits(model, LENGTH)
    assert [len(graph.mixers) for graph in graphs if graph.plan] == [1]


def test_two_stacks_with_a_break_between_them(model: MambaForCausalLM, graphs: list[Transformed]) -> None:
    """Each is whole in its graph."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model, tiny_model(layers=2)

        def forward(self, ids: Tensor) -> Tensor:
            first = self.first(ids).logits
            torch._dynamo.graph_break()
            return first + self.second(ids).logits

    towers, ids = Towers(), random_ids(2, LENGTH)
    with torch.no_grad():
        found = compiled(towers)(ids)
    expected = sum(pruned_exactly(part, ids, **KEEP_FEW).logits for part in (towers.first, towers.second))
    close(found, expected, 1e-4)
    assert [len(graph.mixers) for graph in graphs if graph.plan] == [3, 2]

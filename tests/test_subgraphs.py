"""Scans inside the graphs of higher-order operators: dense, with the reason, on our kernels, right forward and back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import KEEP_FEW, close, random_ids, simba
from families import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import simba_compile
from simba_compile.passes import Transformed
from simba_compile.passes.subgraphs import with_subgraphs

OPS = torch.ops.simba
REASON = "mixers stand inside tag_activation_checkpoint, which has a graph of its own"


def checkpointing(family: str) -> nn.Module:
    """A model in training, each of whose layers is a checkpoint."""
    model = tiny_model(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def targets(result: Transformed) -> list[Any]:
    """What the dense graph calls, and what the graphs inside it call."""
    return [node.target for graph in with_subgraphs(result.dense) for node in graph.graph.nodes]


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba"])
def test_a_checkpointed_training_step_is_eagers(
    family: str, graphs: list[Transformed], selected: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Jamba's experts have marks around them, which have no gradient: they must not be left inside."""
    model, ids = checkpointing(family), random_ids(2, 50)
    plain = copy.deepcopy(model)
    with caplog.at_level("WARNING", "simba_compile"):
        loss = simba(model, **KEEP_FEW)(ids, labels=ids, use_cache=False).loss
    loss.backward()
    expected = plain(ids, labels=ids, use_cache=False).loss
    expected.backward()
    close(loss, expected, 1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            close(ours.grad, theirs.grad, 1e-4)
    assert not selected
    assert [REASON in record.message for record in caplog.records if record.name == "simba_compile"] == [True]
    (graph,) = graphs
    found = targets(graph)
    assert OPS.linear in found and F.linear not in found and OPS.enter_experts not in found
    assert torch.ops.higher_order.tag_activation_checkpoint not in found


def test_explain_names_the_mixers_and_the_reason() -> None:
    report = simba_compile.explain(checkpointing("mamba"), random_ids(2, 50), options=KEEP_FEW, use_cache=False)
    assert [mixer.path for mixer in report.mixers] == [f"backbone.layers.{i}.mixer" for i in range(3)]
    assert {(mixer.tokens_out, mixer.reason) for mixer in report.mixers} == {(50, REASON)}
    assert all(mixer.flops_dense > 0 for mixer in report.mixers)


def test_a_checkpointed_model_prunes_in_evaluation(selected: list[Tensor]) -> None:
    """Hugging Face checkpoints in training only. The embeddings require gradients (``requires_grad_``) from then on."""
    with torch.no_grad():
        simba(checkpointing("mamba").eval(), **KEEP_FEW)(random_ids(2, 50))
    assert selected


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("selective", [False, True])
def test_a_checkpoint_draws_the_same_dropout_twice(inner: str, selective: bool) -> None:
    kept: list[bool] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept.append(op is torch.ops.aten.sin.default)
        return CheckpointPolicy.MUST_SAVE if kept[-1] else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    x = torch.ones(200, requires_grad=True)
    run = simba(lambda x: checkpoint(lambda x: F.dropout(x, 0.5).sin(), x, use_reentrant=False, **contexts), inner=inner)
    y = run(x)
    y.sum().backward()
    assert x.grad is not None and 0 < (y == 0).sum() < 200
    assert torch.equal(y == 0, x.grad == 0)
    assert any(kept) == selective


def test_a_branch_of_cond_is_dense() -> None:
    model = tiny_model("mamba")

    def either(ids: Tensor) -> Tensor:
        h = model.backbone.embeddings(ids)
        first, second = (layer.mixer for layer in model.backbone.layers[:2])
        return torch.cond(h.sum() > 0, lambda h: h + first(h), lambda h: h + second(h), (h,))

    with torch.no_grad():
        for seed in range(4):
            ids = random_ids(2, 50, seed)
            close(simba(either, **KEEP_FEW)(ids), either(ids), 1e-5)
        report = simba_compile.explain(either, ids, options=KEEP_FEW)
    assert [mixer.reason for mixer in report.mixers] == ["mixers stand inside cond, which has a graph of its own"] * 2


def test_mixers_inside_and_outside_are_reported_in_their_order() -> None:
    first, second, third = (layer.mixer for layer in tiny_model("mamba").backbone.layers)

    def function(h: Tensor) -> Tensor:
        h = h + first(h)
        h = torch.cond(h.sum() > 0, lambda h: h + second(h), lambda h: h + second(h), (h,))
        return h + third(h)

    with torch.no_grad():
        report = simba_compile.explain(function, torch.randn(2, 50, 32), options=KEEP_FEW)
    order = [int("".join(filter(str.isdigit, mixer.path))) for mixer in report.mixers]  # __closure__.0.cell_contents
    assert order == [0, 1, 1, 2]
    assert {mixer.reason for mixer in report.mixers} == {"mixers stand inside cond, which has a graph of its own"}


@pytest.mark.parametrize("writes", [False, True])
def test_a_subgraph_after_a_pruned_mixer_sees_every_token(writes: bool, selected: list[Tensor]) -> None:
    """Of a graph inside without a mixer. One that may write into what it reads keeps the mixers before it dense."""
    model, ids = tiny_model("mamba"), random_ids(2, 50)

    def branch(x: Tensor) -> Tensor:
        doubled = x.clone()
        if writes:
            doubled[:, :].mul_(2)  # through a view: the write stays one
        return doubled if writes else x * 2

    def doubled(ids: Tensor) -> Tensor:
        h = model.backbone(ids, use_cache=False).last_hidden_state
        return torch.cond(ids.sum() > 0, branch, branch, (h,))

    with torch.no_grad():
        found = simba(doubled, **KEEP_FEW)(ids)
        assert bool(selected) is not writes
        same = model.backbone if writes else simba(model.backbone, **KEEP_FEW)
        close(found, 2 * same(ids, use_cache=False).last_hidden_state, 1e-5)


class Checkpointed(nn.Module):
    """A norm that is computed again for the backward pass."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.norm, hidden, use_reentrant=False)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_an_input_named_as_a_method(family: str, graphs: list[Transformed], selected: list[Tensor]) -> None:
    """Dynamo calls it as the node that it comes from: `to`, `add`."""
    model, ids = tiny_model(family), random_ids(2, 50)
    for layer in model.backbone.layers:
        layer.norm = Checkpointed(layer.norm)
    expected = model(ids).logits
    close(simba(model, keep=1.0)(ids).logits, expected, 1e-5)
    inside = with_subgraphs(graphs[0].dense)[1:]
    names = {node.target for graph in inside for node in graph.graph.find_nodes(op="placeholder")}
    assert inside and not any(hasattr(Tensor, name) for name in names)
    assert all(OPS.rms_norm in [node.target for node in graph.graph.nodes] for graph in inside)
    simba(model, **KEEP_FEW)(ids)
    assert selected

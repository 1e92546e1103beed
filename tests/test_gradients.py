"""Gradients and training steps through a pruned model, and the inner compilers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    KEEP_FEW,
    cache_of,
    close,
    each_family,
    pruned_exactly,
    random_ids,
    simba,
    ssm_states,
    tiny_model,
)
from torch import Tensor, nn

import simba_compile.backend
from simba_compile.cli.models import going_on


@each_family
@pytest.mark.parametrize("options", [KEEP_FEW, {**KEEP_FEW, "placement": "layer"}], ids=["scan", "layer"])
def test_gradients_are_the_references(family: str, options: dict[str, Any], selected: list[Tensor]) -> None:
    model = tiny_model(family, torch.float64, layers=3).train()
    other = copy.deepcopy(model)
    ids = random_ids(2, 50)
    out = simba(model, **options)(ids, labels=ids)
    out.loss.backward()
    logits = pruned_exactly(other, ids, **options).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert selected
    close(out.loss, loss, 1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.any(), name
        close(ours.grad, theirs.grad, 1e-5)


def hidden_and_logits(model: nn.Module) -> Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]:
    """The hidden states are returned first: they are restored first."""

    def run(ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        out = model(ids, output_hidden_states=True, use_cache=False)
        return out.hidden_states, out.logits

    return run


@pytest.mark.parametrize(("family", "config"), [("mamba", {"use_bias": True}), ("granitemoehybrid", {})])
def test_gradients_of_hidden_states(family: str, config: dict[str, Any]) -> None:
    model, ids = families.tiny_model(family, **config), random_ids(2, 40)
    hidden_and_logits(model)(ids)  # transformers sets its hooks at the first call
    grads = []
    for run in (hidden_and_logits(model), simba(hidden_and_logits(model), keep=1.0)):
        hidden, logits = run(ids)
        grads.append(torch.autograd.grad(logits[:, -1].square().sum(), hidden[:-1]))
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, 1e-4)


def test_a_pruned_layers_hidden_state_has_no_gradient(selected: list[Tensor]) -> None:
    """What is returned was restored beside the way to the logits: none, and not only that of the tokens that have left."""
    hidden, logits = simba(hidden_and_logits(tiny_model()), **KEEP_FEW)(random_ids(2, 40))
    assert selected
    grads = torch.autograd.grad(logits.square().sum(), hidden, allow_unused=True)
    assert [grad is None for grad in grads] == [False, True, True, False]  # the last is what the head reads


@pytest.mark.parametrize("options", [{"keep": 1.0}, KEEP_FEW], ids=["dense", "pruned"])
def test_second_derivatives_are_refused(options: dict[str, Any]) -> None:
    """Those of the kernels would be missing from the sum. First ones may ask for a graph."""
    embeddings = torch.randn(2, 20, 32, requires_grad=True)
    loss = simba(tiny_model(layers=2), **options)(inputs_embeds=embeddings).logits.square().sum()
    (plain,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("family", "inner"), [("mamba", "eager"), ("mamba2", "aot_eager"), ("jamba", "eager")])
def test_the_gradient_of_a_decoding_step_is_refused(family: str, inner: str) -> None:
    """Of states that are written in place there is none; torch would take it for zero. The step itself runs."""
    model, ids = families.tiny_model(family), random_ids(2, 40)
    compiled = simba(model, inner=inner, **KEEP_FEW)
    logits = compiled(ids[:, :1], **going_on(compiled(ids, use_cache=True))).logits
    with torch.no_grad():
        close(logits, compiled(ids[:, :1], **going_on(compiled(ids, use_cache=True))).logits, 1e-5)
    with pytest.raises(NotImplementedError, match=r"update has no gradient: .* give the model whole sequences"):
        logits.sum().backward()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_step_that_overwrites_what_autograd_has_saved_is_noticed(family: str) -> None:
    """A loss on the states that a prompt left, which a step without gradients then goes on from."""
    model, ids = families.tiny_model(family), random_ids(2, 40)
    compiled = simba(model, **KEEP_FEW)
    out = compiled(ids, use_cache=True)
    loss = sum(state.square().sum() for state in ssm_states(cache_of(out)))
    with torch.no_grad():
        compiled(ids[:, :1], **going_on(out))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_gradients_through_two_parts_of_a_prompt(family: str) -> None:
    """The second scan of Mamba-2 goes on from a state of the cache, into which its own is then written."""
    model, ids = families.tiny_model(family), random_ids(2, 60)
    found = []
    for run in (model, simba(model, keep=1.0)):
        out = run(ids[:, 40:], **going_on(run(ids[:, :40], use_cache=True)))
        found.append(torch.autograd.grad(out.logits.square().mean(), [*model.parameters()], allow_unused=True))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            close(ours, theirs, 1e-4)


@pytest.mark.parametrize("family", ["mamba", "bamba"])
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_a_call_without_gradients_takes_none_from_the_next(family: str, keep: float) -> None:
    """In one region of autocast, which keeps its copies of weights from call to call."""
    model, ids = families.tiny_model(family), random_ids(2, 60)
    compiled = simba(model, keep=keep, min_tokens=8)
    found = []
    for before in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                with torch.no_grad():
                    compiled(ids)
            loss = compiled(ids, labels=ids).loss
        found.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert all(torch.equal(alone, after) for alone, after in zip(*found, strict=True))


def test_gradients_through_a_pruned_cache(selected: list[Tensor]) -> None:
    """Of a second part's outputs for what made the keys and values of the first, along a line through the parameters."""
    model, ids = families.tiny_model("zamba", torch.float64), random_ids(2, 50)
    weights = [value for name, value in model.named_parameters() if "k_proj" in name or "v_proj" in name]
    directions = [torch.randn_like(weight) for weight in weights]
    compiled = simba(model.base_model, **KEEP_FEW)

    def loss(step: float = 0.0) -> Tensor:
        for weight, direction in zip(weights, directions, strict=True):
            weight.data.add_(direction, alpha=step)
        after = going_on(compiled(ids[:, :40], use_cache=True))
        value = compiled(ids[:, 40:], **after).last_hidden_state.square().mean()
        for weight, direction in zip(weights, directions, strict=True):
            weight.data.sub_(direction, alpha=step)
        return value

    with families.exact(model):
        grads = torch.autograd.grad(loss(), weights)
        slope = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
        assert selected and weights
        close(slope, (loss(1e-5) - loss(-1e-5)) / 2e-5, 1e-4)  # of a difference, beside weights in float32


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_gradients_in_a_batch(family: str) -> None:
    """As `jacobian` asks for them: all of torch's operations in our gradients can be batched."""
    model, embeddings = families.tiny_model(family), torch.randn(1, 20, families.HIDDEN)
    expected, actual = (
        torch.autograd.functional.jacobian(
            lambda x, run=run: run(inputs_embeds=x, use_cache=False).logits[0, -1, :3], embeddings, vectorize=True
        )
        for run in (model, simba(model, keep=1.0))
    )
    close(actual, expected, 1e-5)


def test_a_training_step_in_place() -> None:
    """The compiled model sees what the optimiser wrote, and its loss falls."""
    model = tiny_model(layers=2).train()
    compiled = simba(model, **KEEP_FEW)
    ids = random_ids(2, 50)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = compiled(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inner_compilers_compute_the_same(inner: str, selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    results = []
    for chosen in ("eager", inner):
        torch._dynamo.reset()
        compiled = simba(model, inner=chosen, **KEEP_FEW)
        selected.clear()
        with torch.no_grad():
            results.append([compiled(random_ids(2, length)).logits for length in (40, 55)])
        assert len(selected) == 2
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 1e-6)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The operations of each graph that an inner compiler is given, which then runs it as it is."""
    graphs: list[set[str]] = []

    def inner(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append({str(node.target) for node in gm.graph.nodes})
        return gm

    original = simba_compile.backend.compile_inner
    monkeypatch.setattr(simba_compile.backend, "compile_inner", lambda gm, chosen, mode=None, **_: original(gm, inner, mode))
    return graphs


def test_inner_compilers_see_whole_graphs(shown: list[set[str]]) -> None:
    """Of a pruned prompt, whatever its length, and of a step: one graph each, with our operators in it."""
    compiled, ids = simba(tiny_model(layers=2), **KEEP_FEW), random_ids(2, 40)
    with torch.no_grad():
        out = compiled(ids, use_cache=True)
        compiled(random_ids(3, 55), use_cache=True)
        compiled(ids[:, :1], **going_on(out), use_cache=True)
    assert len(shown) == 2
    assert {"simba.rms_norm", "simba.influence", "simba.select", "simba.selective_scan"} <= shown[0]
    assert {"simba.rms_norm", "simba.mixer_update"} <= shown[1]


def test_inner_compilers_see_every_graph(shown: list[set[str]]) -> None:
    """Dynamo compiles a code object eight times at most."""
    for size in range(2, 13):
        layer = torch.nn.Linear(size, 1)
        simba_compile.backend.compile_inner(torch.fx.symbolic_trace(layer), "inductor")(torch.ones(2, size))
    assert len(shown) == 11


class OnGpu(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_inner_compilers_run_on_the_gpu_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one, where Triton would start a kernel."""
    entered: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(value: Tensor) -> Iterator[None]:
        entered.append(value)
        yield
        entered.append(value)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "compile", lambda function, **given: lambda *args: len(entered))
    run = simba_compile.backend.compile_inner(torch.fx.symbolic_trace(torch.nn.ReLU()), "aot_eager")
    held = torch.ones(2).as_subclass(OnGpu)
    assert run(3, torch.ones(2), held) == 1 and len(entered) == 2 and all(value is held for value in entered)
    assert run(3, torch.ones(2)) == 2  # none is entered


def test_gradients_through_aot_eager() -> None:
    model, ids = tiny_model(dtype=torch.float64, layers=2).train(), random_ids(2, 40)
    grads = []
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model.zero_grad()
        simba(model, inner=inner, **KEEP_FEW)(ids, labels=ids).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, 1e-6)

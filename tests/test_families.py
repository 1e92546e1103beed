"""Every Mamba-based family of transformers under ``torch.compile(model, backend="simba")``, against `family_reference`.

The reference itself is held against Hugging Face's eager code first, in float64, where it has to be exact. What is
compared afterwards are places of kept tokens, logits, hidden states, caches, gradients and generated tokens.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    KEEP_FEW,
    VOCABULARY,
    assert_steps_with_our_operators,
    cache_of,
    close,
    left_padding,
    original_places,
    random_ids,
    simba,
)
from eager_reference import counts
from families import FAMILIES, exact, tiny_model
from family_reference import LayerState, Pass, n_mixers, pruned_forward, reference_generate
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from simba_compile.kernels import reference
from simba_compile.passes import Transformed

PRUNED: dict[str, Any] = {"keep": 0.3, "min_tokens": 4}
LENGTH = 40
NEW_TOKENS = 4

each_family = pytest.mark.parametrize("family", FAMILIES)
# Mamba and FalconMamba generate in test_backend.
each_new_family = pytest.mark.parametrize("family", [*FAMILIES][2:])


def tolerance(family: str) -> float:
    """How far float64 models may be from the reference: routers round to float32, all else is exact."""
    return 1e-6 if FAMILIES[family].routes else 1e-10


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    """All that it holds, layer by layer."""
    return [value for value in tree_leaves([vars(layer) for layer in cache.layers]) if isinstance(value, Tensor)]


def assert_same_states(cache: DynamicCache, states: list[LayerState], error: float) -> None:
    """A cache holds, layer by layer, what the reference left behind."""
    for layer, state in zip(cache.layers, states, strict=True):
        if state.conv is not None:
            close(layer.conv_states[0], state.conv, error)
            close(layer.recurrent_states[0], state.ssm.reshape(layer.recurrent_states[0].shape), error)
        if state.keys is not None:
            assert_same_entries(layer.keys, state.keys, state.key_places, error)
            assert_same_entries(layer.values, state.values, state.key_places, error)


def assert_same_entries(cached: Tensor, kept: Tensor, places: Tensor, error: float) -> None:
    """A cache has an entry for each token: those of the tokens that attention saw, and marks for the others."""
    close(cached.gather(2, places[:, None, :, None].expand(kept.shape)), kept, error)
    pruned = torch.ones(cached.shape[0], cached.shape[2], dtype=torch.bool).scatter(1, places, False)
    assert torch.equal(reference.is_marked(cached), pruned[:, None, :, None].expand(cached.shape))


def assert_same_pass(output: Any, expected: Pass, error: float) -> None:
    """Logits and hidden states of every position, and the cache, are the reference's."""
    close(output.logits, expected.logits, max(error, 1e-6))  # some models return float32
    assert len(output.hidden_states) == len(expected.hidden_states)
    for actual, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(actual, wanted, error)
    assert_same_states(cache_of(output), expected.states, error)


def generate(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What `generate` writes greedily, and the logits behind it."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


# --- the reference ---------------------------------------------------------------------------------------------------


@each_family
def test_the_reference_is_hugging_face_where_all_stay(family: str) -> None:
    model = tiny_model(family, torch.float64)
    ids, mask = random_ids(2, LENGTH), left_padding(2, LENGTH)
    with torch.no_grad(), exact(model):
        for padding in (None, mask):
            output = model(ids, attention_mask=padding, output_hidden_states=True, use_cache=True)
            assert_same_pass(output, pruned_forward(model, ids, padding, keep=1.0), 1e-11)
        written, logits = generate(model, ids, mask)
        expected, their_logits = reference_generate(model, ids, mask, NEW_TOKENS, keep=1.0)
    assert torch.equal(written, expected)
    close(logits, their_logits, 1e-6)


@each_family
def test_the_reference_keeps_what_the_contract_says(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        run = pruned_forward(model, random_ids(2, LENGTH), left_padding(2, LENGTH), **PRUNED)
        everything = pruned_forward(model, random_ids(2, LENGTH), left_padding(2, LENGTH), keep=1.0)
    sizes = counts(LENGTH, n_mixers(model), **PRUNED)
    assert [places.shape[1] for places in run.kept] == sizes and sizes[-1] == 12
    for row in range(2):
        entered, padding = [*range(LENGTH)], {*range(5 * row)}
        for places in run.kept:
            stay = places[row].tolist()
            left = {*entered} - {*stay}
            assert stay == sorted(stay) and {*stay} <= {*entered} and stay[-1] == LENGTH - 1
            assert left <= padding or padding.isdisjoint(stay)  # it goes first
            entered = stay
    assert run.kept[-1][0].tolist() != [*range(LENGTH - 12, LENGTH)]  # tokens differ in their influence
    assert not torch.allclose(run.logits[:, -1], everything.logits[:, -1], rtol=0.01)


# --- the compiler ----------------------------------------------------------------------------------------------------


@each_family
def test_pruned_forward_and_backward(family: str, selected: list[Tensor], graphs: list[Transformed]) -> None:
    """One graph for several lengths and batch sizes, and its gradients."""
    model = tiny_model(family, torch.float64)
    other = copy.deepcopy(model)
    compiled = simba(model, **PRUNED)
    error = tolerance(family)
    for batch, length in ((2, LENGTH), (3, 57), (4, 23)):
        ids, mask = random_ids(batch, length, seed=length), left_padding(batch, length)
        selected.clear()
        output = compiled(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
        with exact(other):
            expected = pruned_forward(other, ids, mask, **PRUNED)
        kept = [places.tolist() for places in expected.kept[1:]]  # the first mixer keeps all
        assert original_places(selected, length) == kept
        assert_same_pass(output, expected, error)
    assert len(graphs) == 1
    assert {mixer.path for mixer in graphs[0].mixers} <= dict(model.named_modules()).keys()
    assert graphs[0].on_all_tokens == []

    F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            assert theirs.grad.any(), name
            close(ours.grad, theirs.grad, 1e-5)


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h"])
def test_a_default_device(family: str) -> None:
    """It sets a mode of torch functions, under which Dynamo shows calls by other names."""
    model, ids = tiny_model(family), random_ids(2, LENGTH)
    compiled = torch.compile(model, backend="simba", options=KEEP_FEW)
    with torch.no_grad():
        expected = pruned_forward(model, ids, **KEEP_FEW).logits
        torch.set_default_device("cpu")
        try:
            found = compiled(ids).logits
        finally:
            torch.set_default_device(None)
    close(found, expected, 1e-4)


@each_new_family
def test_generate_after_a_pruned_prefill(family: str, selected: list[Tensor], graphs: list[Transformed]) -> None:
    """Positions, masks and states in decoding are those of the tokens that stayed, with padding on the left too."""
    model = tiny_model(family, torch.float64)
    other = copy.deepcopy(model)
    ids, mask = random_ids(3, LENGTH), left_padding(3, LENGTH)
    model.compile(backend="simba", options=PRUNED)
    written, logits = generate(model, ids, mask)
    assert len(selected) == n_mixers(model) - 1  # decoding prunes nothing
    assert len(graphs) == 2  # of the prompt, and of all steps, although the cache grows
    assert_steps_with_our_operators(*graphs)
    with torch.no_grad(), exact(other):
        expected, their_logits = reference_generate(other, ids, mask, NEW_TOKENS, **PRUNED)
    close(logits, their_logits, 1e-6)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("family", ["bamba", "falcon_h1"])
def test_generate_without_padding(family: str, selected: list[Tensor]) -> None:
    """Hugging Face drops a mask of ones, and then builds none."""
    model = tiny_model(family, torch.float64)
    other = copy.deepcopy(model)
    ids = random_ids(2, LENGTH)
    model.compile(backend="simba", options=PRUNED)
    written, logits = generate(model, ids, torch.ones_like(ids))
    assert selected
    with torch.no_grad(), exact(other):
        expected, their_logits = reference_generate(other, ids, None, NEW_TOKENS, **PRUNED)
    close(logits, their_logits, 1e-6)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("family", ["jamba", "zamba"])
def test_one_sequence(family: str, graphs: list[Transformed]) -> None:
    """Batch and token axes of experts, and the heads of zamba, are told apart where the batch is a plain 1."""
    model = tiny_model(family, torch.float64)
    compiled = simba(model, **PRUNED)
    with torch.no_grad(), exact(model):
        expected = {length: pruned_forward(model, random_ids(1, length), None, **PRUNED) for length in (LENGTH, 57)}
    for length, wanted in expected.items():
        output = compiled(random_ids(1, length), output_hidden_states=True, use_cache=True)
        assert_same_pass(output, wanted, tolerance(family))
    assert len(graphs) == 1


@each_new_family
def test_keep_everything_is_hugging_face(family: str, selected: list[Tensor]) -> None:
    """In float32: logits, hidden states of all positions and the cache. Steps are those after a pruned prompt."""
    model = tiny_model(family)
    ids, mask = random_ids(2, LENGTH), left_padding(2, LENGTH)
    call: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        out, theirs = simba(model, keep=1.0)(ids, **call), model(ids, **call)
    # Rounding that Zamba2's three attentions magnify: its eager code is as far, 3e-5, from itself in float64.
    close(out.logits, theirs.logits, 2e-4)
    for ours, right in zip(out.hidden_states, theirs.hidden_states, strict=True):
        close(ours, right, 2e-4)
    for ours, right in zip(tensors_of(cache_of(out)), tensors_of(cache_of(theirs)), strict=True):
        close(ours, right, 2e-4)
    assert not selected


@each_family
def test_bfloat16(family: str, selected: list[Tensor], graphs: list[Transformed]) -> None:
    """About as near to the float64 reference as eager bfloat16 is, in most sequences: some may keep other tokens."""
    model = tiny_model(family, torch.bfloat16)
    precise = tiny_model(family, torch.float64)
    precise.load_state_dict(model.state_dict())
    ids = random_ids(6, LENGTH)
    with torch.no_grad():
        output, dense = simba(model, **PRUNED)(ids).logits, model(ids).logits
    with torch.no_grad(), exact(precise):
        expected = pruned_forward(precise, ids, **PRUNED)
        exactly = pruned_forward(precise, ids, keep=1.0).logits
    assert output.shape == (6, LENGTH, VOCABULARY) and output.isfinite().all()
    ours, right = original_places(selected, LENGTH)[-1], expected.kept[-1].tolist()
    common = sum(len({*a} & {*b}) for a, b in zip(ours, right, strict=True)) / sum(map(len, right))
    assert common >= 0.75  # scores that are near each other change places
    rounding = (dense.double() - exactly).norm(dim=-1).median()
    assert (output.double() - expected.logits).norm(dim=-1).median() <= 2 * rounding
    left = [node for node in graphs[0].pruned.graph.nodes if node.target in (torch.rsqrt, "rsqrt")]  # type: ignore[union-attr]
    assert not left, "a norm is in parts"


def test_the_table_has_every_family() -> None:
    """Every file of transformers' models that defines a selective scan has its row."""
    folder = Path(transformers.models.__path__[0])
    defines = re.compile(r"^def mamba2?_(selective|chunk)_scan\(", re.MULTILINE)
    scans = {file.parent.name for file in folder.glob("*/modeling_*.py") if defines.search(file.read_text("utf-8"))}
    assert scans == {tiny_model(family).config.model_type for family in FAMILIES}

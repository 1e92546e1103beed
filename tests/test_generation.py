"""`generate`: the tokens that Hugging Face's model writes, from states that pruning left as the contract says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers
from conftest import (
    KEEP_FEW,
    assert_steps_with_our_operators,
    cache_of,
    close,
    each_family,
    left_padding,
    pruned_exactly,
    random_ids,
    simba,
    tiny_model,
)
from torch import Tensor, nn

from simba_compile.cli.models import going_on
from simba_compile.passes import Transformed

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
    "padded": {"do_sample": False},
}


@pytest.mark.parametrize(("family", "mode"), [*(("mamba", mode) for mode in MODES), ("falcon_mamba", "padded")])
def test_generation_that_keeps_everything_is_hugging_faces(family: str, mode: str) -> None:
    model = tiny_model(family, layers=2)
    ids = random_ids(3, 40)
    extra = dict(MODES[mode], max_new_tokens=8)
    if mode == "padded":
        extra["attention_mask"] = left_padding(3, 40)
        ids = ids * extra["attention_mask"]
    torch.manual_seed(1)
    expected = model.generate(ids, **extra)
    model.compile(backend="simba", options={"keep": 1.0})
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **extra), expected)


def continued(model: nn.Module, ids: Tensor, mask: Tensor | None, following: Tensor, **options: Any) -> list[Tensor]:
    """The logits of eager decoding from the reference's pruned states, for given tokens (or greedily, for a count)."""
    expected = pruned_exactly(model, ids, mask, **options)
    out = model(ids, attention_mask=mask, use_cache=True)
    for layer, conv, ssm in zip(cache_of(out).layers, expected.conv_states, expected.ssm_states, strict=True):
        layer.conv_states[0].copy_(conv)
        layer.recurrent_states[0].copy_(ssm)
    logits, cache = [expected.logits[:, -1]], going_on(out)
    for token in following.unbind(1):
        logits.append(model(token[:, None], **cache, use_cache=True).logits[:, -1])
    return logits


@each_family
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_goes_on_from_the_pruned_states(
    family: str, padded: bool, selected: list[Tensor], graphs: list[Transformed]
) -> None:
    model = tiny_model(family, torch.float64, layers=2)
    ids, following = random_ids(3, 50), random_ids(3, 5, seed=1)
    mask = left_padding(3, 50) if padded else None
    with torch.no_grad():
        expected = continued(model, ids, mask, following, **KEEP_FEW)
        compiled = simba(model, **KEEP_FEW)
        out = compiled(ids, attention_mask=mask, use_cache=True)
        prunings = len(selected)
        actual, cache = [out.logits[:, -1]], going_on(out)
        for token in following.unbind(1):
            out = compiled(token[:, None], **cache, use_cache=True)
            actual.append(out.logits[:, -1])
    assert prunings > 0 and len(selected) == prunings  # decoding prunes nothing
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs, 1e-5)  # Hugging Face's step rounds its activations to float32
    assert_steps_with_our_operators(graphs[0], graphs[-1])


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_a_cache_that_records_its_past_leaves_the_prompt_dense(family: str, graphs: list[Transformed]) -> None:
    """It has all that the convolutions read, with nothing that tells which tokens entered their layers."""
    model = families.tiny_model(family)

    def logits(run: Callable[..., Any]) -> list[Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        cache.activate_past_recording()
        calls = (random_ids(2, 50), random_ids(2, 1, seed=1))
        return [run(ids, use_cache=True, **{name: cache}).logits[:, -1] for ids in calls]

    with torch.no_grad():
        (name,) = going_on(model(random_ids(2, 5), use_cache=True))
        for ours, theirs in zip(logits(simba(model, **KEEP_FEW)), logits(model), strict=True):
            close(ours, theirs, 1e-4)
    assert "records its past" in (graphs[0].mixers[0].reason or "")


@pytest.mark.parametrize("padded", [False, True])
def test_generate_after_a_pruned_prefill(padded: bool, selected: list[Tensor]) -> None:
    """What `generate` writes is what eager decoding from the reference's states ranks first, step by step."""
    model = tiny_model(dtype=torch.float64, layers=2)
    plain = copy.deepcopy(model)
    ids, mask = random_ids(2, 60), left_padding(2, 60) if padded else torch.ones(2, 60, dtype=torch.int64)
    model.compile(backend="simba", options=KEEP_FEW)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 60:]
    assert selected
    protected = {**KEEP_FEW, "protect_last": 1}
    with torch.no_grad():
        logits = continued(plain, ids, mask if padded else None, written[:, :-1], **protected)
    assert torch.equal(torch.stack([step.argmax(-1) for step in logits], 1), written)


def test_beams_and_samples_with_pruning_run(selected: list[Tensor]) -> None:
    model = tiny_model(layers=2)
    model.compile(backend="simba", options=KEEP_FEW)
    for extra in (MODES["beams"], MODES["sampled"]):
        written = model.generate(random_ids(2, 50), max_new_tokens=4, **extra)
        assert written.shape == (2, 54) and torch.equal(written[:, :50], random_ids(2, 50))
    assert selected

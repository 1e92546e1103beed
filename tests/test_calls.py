"""What callers pass: labels, embeddings, tuples, short and empty batches, numbers that are not finite."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    KEEP_FEW,
    VOCABULARY,
    assert_as_contracted,
    cache_of,
    close,
    conv_states,
    pruned_exactly,
    random_ids,
    simba,
    tiny_model,
)
from torch import Tensor

from simba_compile.cli.models import going_on


def test_labels_embeddings_and_tuples(selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    ids = random_ids(2, 50)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        expected = pruned_exactly(model, ids, **KEEP_FEW).logits
        out = compiled(ids, labels=ids)
        close(out.loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), 1e-6)
        close(out.logits, expected, 1e-6)
        embedded = compiled(inputs_embeds=model.backbone.embeddings(ids), use_cache=False)
        close(embedded.logits, expected, 1e-6)
        close(compiled(ids, return_dict=False)[0], expected, 1e-6)
    assert len(selected) == 3


@pytest.mark.parametrize("square_first", [True, False])
def test_a_batch_as_large_as_the_length(square_first: bool) -> None:
    """Pruned or dense, but never wrong; and other shapes still prune."""
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(model, **KEEP_FEW)
    shapes = [(40, 40), (3, 40), (40, 40)] if square_first else [(3, 40), (40, 40), (3, 40)]
    for batch, length in shapes:
        ids = random_ids(batch, length)
        with torch.no_grad():
            out = compiled(ids).logits
            pruned, dense = pruned_exactly(model, ids, **KEEP_FEW).logits, model(ids).logits
        is_pruned = torch.allclose(out.double(), pruned, atol=1e-4)
        assert is_pruned or (batch == length and torch.allclose(out, dense, atol=1e-4))


@pytest.mark.parametrize("length", [1, 3, 4])
def test_short_prompts_are_dense(length: int, selected: list[Tensor]) -> None:
    """Down to fewer tokens than the convolution has taps, with a cache and decoding after it."""
    model = tiny_model(layers=2)
    ids = random_ids(2, length)
    compiled = simba(model)
    with torch.no_grad():
        dense = model(ids, use_cache=True)
        out = compiled(ids, use_cache=True)
        close(out.logits, dense.logits, 2e-5)
        for ours, theirs in zip(conv_states(cache_of(out)), conv_states(cache_of(dense)), strict=True):
            close(ours, theirs, 2e-5)
        following = random_ids(2, 1, seed=1)
        close(
            compiled(following, **going_on(out), use_cache=True).logits,
            model(following, **going_on(dense), use_cache=True).logits,
            2e-5,
        )
    assert not any(index.shape[1] < length for index in selected)


def test_at_most_min_tokens_is_dense(selected: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(layers=2)
    compiled = simba(model, keep=0.1)  # min_tokens is 32
    for length in (20, 32, 20):
        with torch.no_grad(), caplog.at_level(logging.INFO, "simba_compile"):
            close(compiled(random_ids(2, length)).logits, model(random_ids(2, length)).logits, 2e-5)
    assert not selected
    assert [record.message for record in caplog.records if "Dense" in record.message] == [  # once
        "Dense: there are no more tokens than min_tokens, which is 32."
    ]
    with torch.no_grad():
        compiled(random_ids(2, 33))
    assert [index.shape[1] for index in selected] == [32]


def test_each_reason_for_a_dense_call_is_told(caplog: pytest.LogCaptureFixture) -> None:
    compiled = simba(tiny_model(layers=2), protect_last=60)
    for length in (20, 50, 31, 52):
        with torch.no_grad(), caplog.at_level(logging.INFO, "simba_compile"):
            compiled(random_ids(2, length))
    assert [record.message for record in caplog.records if "Dense" in record.message] == [
        "Dense: there are no more tokens than min_tokens, which is 32.",
        "Dense: all tokens are protected: 0 at the start, 60 at the end.",
    ]


def test_a_prompt_of_less_than_the_convolution_and_then_a_long_one(selected: list[Tensor]) -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        for length in (2, 3):
            close(compiled(random_ids(2, length), use_cache=True).logits, model(random_ids(2, length)).logits, 1e-5)
    assert_as_contracted(compiled, model, random_ids(2, 50), None, selected, **KEEP_FEW)
    assert selected


@pytest.mark.parametrize("warm", [False, True])
def test_empty_batch(warm: bool) -> None:
    model = tiny_model(layers=2)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        if warm:
            compiled(random_ids(2, 50))
        out = compiled(torch.zeros(0, 50, dtype=torch.int64))
    assert out.logits.shape == (0, 50, VOCABULARY)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_numbers_stay_visible(value: float) -> None:
    """Non-finite where the dense model is, in their own sequence, from their own position on."""
    model = tiny_model(layers=3)
    embedded = model.backbone.embeddings(random_ids(3, 50)).detach().clone()
    embedded[1, 20, 5] = value
    with torch.no_grad():
        dense = model(inputs_embeds=embedded).logits
        out = simba(model, **KEEP_FEW)(inputs_embeds=embedded).logits
    assert not dense[1, 20:].isfinite().any()  # what is compared with
    assert torch.equal(out.isfinite(), dense.isfinite())

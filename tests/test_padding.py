"""Padding on the right: the last position says nothing of the text, so the call runs dense, and says why."""

from __future__ import annotations

import logging

import families
import pytest
import torch
from conftest import KEEP_FEW, random_ids
from torch import Tensor

import simba_compile

LENGTH, PADDED = 48, 11


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "falcon_h1"])
def test_a_sequence_that_ends_in_padding_is_dense(
    family: str, selected: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = families.tiny_model(family)
    fast = torch.compile(model, backend="simba", options=KEEP_FEW)
    ids, right = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    right[1, -PADDED:] = 0
    left = right.flip(1)
    with caplog.at_level(logging.WARNING, "simba_compile"), torch.no_grad():
        for _ in range(2):
            out = fast(ids, attention_mask=right).logits
        assert not selected
        expected = model(ids, attention_mask=right).logits
        fast(ids, attention_mask=left)
        assert selected
    torch.testing.assert_close(out[right.bool()], expected[right.bool()], rtol=1e-4, atol=1e-4)
    assert caplog.text.count("ends in padding") == 1 and "pad on the left" in caplog.text


def test_explain_says_so() -> None:
    model, ids = families.tiny_model("mamba"), random_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        pruned = simba_compile.explain(model, ids, options=KEEP_FEW, attention_mask=mask)
        mask[0, -1] = 0
        dense = simba_compile.explain(model, ids, options=KEEP_FEW, attention_mask=mask)
    assert pruned.mixers[-1].tokens_out < LENGTH and not any(mixer.reason for mixer in pruned.mixers)
    assert {mixer.tokens_out for mixer in dense.mixers} == {LENGTH}
    assert dense.flops_pruned == dense.flops_dense and all("padding" in str(mixer.reason) for mixer in dense.mixers)

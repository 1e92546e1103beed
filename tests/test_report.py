"""What `simba_compile.explain` reports of a call, on models of a few thousand weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import KEEP_FEW, random_ids, tiny_model
from eager_reference import counts
from torch import Tensor

import simba_compile

LENGTH = 50


def tokens_left(report: simba_compile.Report) -> list[int]:
    return [mixer.tokens_out for mixer in report.mixers]


@pytest.mark.parametrize("options", [KEEP_FEW, simba_compile.Options(**KEEP_FEW)])
def test_tokens_are_the_contracts(options: Any) -> None:
    with torch.no_grad():
        report = simba_compile.explain(tiny_model(layers=3), random_ids(2, LENGTH), options=options)
    assert tokens_left(report) == counts(LENGTH, 3, **KEEP_FEW)
    assert report.graphs == 1 and report.flops_pruned < report.flops_dense
    assert report.to_dict()["mixers"][0]["kind"] == "mamba1"


def test_the_length_is_the_sequences_whatever_the_call_reads_first() -> None:
    model = tiny_model(layers=3)

    def scaled(by: Tensor, ids: Tensor) -> Tensor:
        factor = by.sum()
        return model(ids).logits * factor

    with torch.no_grad():
        report = simba_compile.explain(scaled, torch.ones(4, 7), random_ids(2, LENGTH), options=KEEP_FEW)
    assert tokens_left(report) == counts(LENGTH, 3, **KEEP_FEW)


def test_wrong_options_are_told_before_the_call() -> None:
    def never() -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="Did you mean keep"):
        simba_compile.explain(never, options={"kep": 1})

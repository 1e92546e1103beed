"""A whole model under ``backend="simba"`` on the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import have_products_of_torch, left_padding, random_ids, simba, tiny_model
from eager_reference import pruned_forward
from kernel_inputs import DEVICE

from simba_compile.cli.models import going_on
from simba_compile.kernels.gpu import influence, runtime
from simba_compile.kernels.ops import dispatch

OPTIONS: dict[str, Any] = {"keep": 0.3, "min_tokens": 4}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Take the CPU for a GPU, unless there is one, and count the kernels that start."""
    counts: Counter[str] = Counter()
    launch = runtime.launch

    def count(kernel: Callable, *args: Any, **constants: Any) -> None:
        counts[kernel.__name__] += 1
        launch(kernel, *args, **constants)

    monkeypatch.setattr(dispatch, "GPU", DEVICE)
    have_products_of_torch(monkeypatch)
    monkeypatch.setattr(runtime, "launch", count)
    monkeypatch.setattr(influence, "CHUNK", 8)
    return counts


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pruned_model(started: Counter[str]) -> None:
    """Prefill with padding and a cache, then one decoding step: as in the eager reference, on our kernels alone."""
    model = tiny_model(layers=2, hidden_size=8, state_size=4).to(DEVICE)
    ids, mask = random_ids(2, 21).to(DEVICE), left_padding(2, 21).to(DEVICE)
    compiled = simba(model, **OPTIONS)
    with torch.no_grad():
        out = compiled(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
        expected = pruned_forward(model, ids, mask, **OPTIONS)
        step = compiled(ids[:, :1], **going_on(out), use_cache=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert step.logits.isfinite().all()
    kernels = {"_chunk_scores", "_select", "_gather", "_conv", "_rms_norm", "_state_step", "_conv_step"}
    assert kernels <= started.keys(), kernels - started.keys()

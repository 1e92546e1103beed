"""Many calls with everything random: nothing grows, nothing is ever wrong. ``python tests/test_soak.py 10000`` runs long."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, left_padding, pruned_exactly, random_ids, simba, tiny_model

import simba_compile.backend

OPTIONS: list[dict[str, Any]] = [
    {"keep": 1.0},
    {"keep": 0.2, "min_tokens": 4},
    {"keep": 0.4, "placement": "layer", "schedule": "uniform", "min_tokens": 2},
    {"keep": 0.3, "pool": "l2", "dt_bias": "exclude", "protect_first": 2, "protect_last": 3},
]
GROWTH = 8 * 2**20  # bytes; what the allocator's fragments come to, whatever the number of calls


def memory() -> int:
    """What the process has in memory, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(calls: int, chosen: list[dict[str, Any]], seed: int = 0) -> dict[str, float]:
    """So many calls of models with these options each; raises where a result is wrong, or graphs or memory grow.

    Returns
    -------
    dict
        Graphs compiled, and how much the memory grew from half of the calls to the end, in MiB.
    """
    chance, graphs = random.Random(seed), []
    models = [
        tiny_model(family, torch.float64, layers=2, hidden_size=16, state_size=4, seed=i)
        for i, family in zip(range(len(chosen)), itertools.cycle(sorted(FAMILIES)), strict=False)
    ]
    # Dynamo counts the graphs of all models that share a forward: one or more sequences, a mask or none, a cache or none.
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=64):
        original = simba_compile.backend.transform
        patch.setattr(simba_compile.backend, "transform", lambda *args: graphs.append(None) or original(*args))
        compiled = [simba(model, **options) for model, options in zip(models, chosen, strict=True)]
        settled = started = 0
        for call in range(calls):
            which, batch = chance.randrange(len(models)), chance.randint(1, 3)
            length, cached = chance.randint(5, 60), chance.random() < 0.3
            ids, options = random_ids(batch, length, call), chosen[which]
            mask = left_padding(batch, length) if chance.random() < 0.5 else None
            with torch.no_grad():
                ours = compiled[which](ids, attention_mask=mask, use_cache=cached).logits
                if options["keep"] == 1:
                    expected = models[which](ids, attention_mask=mask).logits
                    tolerance = 1e-5  # Hugging Face's eager scan is in float32
                else:
                    expected, tolerance = pruned_exactly(models[which], ids, mask, **options).logits, 1e-6
            error = (ours - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, (call, which, batch, length, mask, error)
            if call == calls // 2:
                settled, started = len(graphs), memory()
        grown = memory() - started
    assert len(graphs) == settled, f"{len(graphs) - settled} graphs were compiled in the second half"
    return {"graphs": len(graphs), "MiB": grown / 2**20}


def test_soak() -> None:
    soak(120, OPTIONS[1:3])


if __name__ == "__main__":
    begin, count = time.perf_counter(), int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    found = soak(count, OPTIONS, seed=1)
    print(f"{count} calls in {time.perf_counter() - begin:.0f} s: {found}")
    assert found["MiB"] * 2**20 < GROWTH, "memory grows"

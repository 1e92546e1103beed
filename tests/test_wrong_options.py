"""Options that are refused when a model is compiled, and modes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    random_ids,
    simba,
    tiny_model,
)

import simba_compile.backend

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"kep": 0.1}, r"'kep' is no option.*Did you mean keep\?.*protect_first"),
    "nothing near": ({"qqq": 1}, r"'qqq' is no option.*The options are keep, schedule"),
    "keep of text": ({"keep": "0.1"}, r"option keep is '0\.1'.*above 0 and at most 1"),
    "keep of 0": ({"keep": 0.0}, r"option keep is 0\.0.*above 0 and at most 1"),
    "keep of 2": ({"keep": 2}, r"option keep is 2;.*at most 1"),
    "keep of nan": ({"keep": math.nan}, r"option keep is nan"),
    "pool": ({"pool": "maxx"}, r"option pool is 'maxx'.*'max', 'absmax', 'l2'.*did you mean"),
    "criterion": ({"criterion": 3}, r"option criterion is 3;.*'influence'"),
    "min_tokens": ({"min_tokens": 0}, r"option min_tokens is 0;.*at least 1"),
    "protect_last": ({"protect_last": 0}, r"option protect_last is 0;.*at least 1"),
    "every": ({"every": 1.5}, r"option every is 1\.5;.*whole number"),
    "schedule": ({"schedule": "lineal"}, r"option schedule is 'lineal'.*did you mean 'linear'"),
    "schedule length": ({"schedule": [1.0, 0.5, 0.2]}, r"schedule lists 3 shares.*2 mixers"),
    "schedule rises": ({"schedule": [0.5, 0.6]}, r"option schedule is \[0\.5, 0\.6\].*larger than the one before"),
    "inner": ({"inner": "cudagraphs"}, r"option inner is 'cudagraphs'.*'inductor'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_raise_from_the_call(case: str) -> None:
    options, message = WRONG[case]
    counts_mixers = case == "schedule length"
    compiled = torch.compile(tiny_model(layers=2) if counts_mixers else torch.sin, backend="simba", options=options)
    with pytest.raises(ValueError, match=message):
        compiled(random_ids(2, 40))


def test_wrong_options_raise_from_a_model_too() -> None:
    compiled = simba(tiny_model(layers=2), kep=0.1)
    with pytest.raises(ValueError, match="Did you mean keep") as error:
        compiled(random_ids(2, 40))
    assert "PyTorch" not in str(error.value)  # how to report a bug there is none of the user's business


def test_a_failure_of_a_pass_is_no_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback is there."""

    def broken(*args: Any) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(simba_compile.backend, "transform", broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not enough values") as error:
        simba(tiny_model(layers=2))(random_ids(2, 40))
    assert any(entry.name == "broken" for entry in error.traceback)


def test_mode_needs_inductor() -> None:
    backend = functools.partial(simba_compile.backend.simba, options={"inner": "eager"})
    with pytest.raises(ValueError, match=r"mode.*inner"):
        torch.compile(tiny_model(layers=1), backend=backend, mode="max-autotune")(random_ids(2, 40))


def test_mode_is_for_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` takes a mode or options, not both: a mode alone has Inductor compile the rest."""
    asked = []

    def spy(gm: torch.fx.GraphModule, inner: str, mode: str | None = None, **_: Any) -> Callable:
        asked.append((inner, mode))
        return gm

    monkeypatch.setattr(simba_compile.backend, "compile_inner", spy)
    torch.compile(tiny_model(layers=2), backend="simba", mode="reduce-overhead")(random_ids(2, 40))
    assert asked == [("inductor", "reduce-overhead")] * 2  # the dense graph and the pruned one

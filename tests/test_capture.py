"""Each substitute that Dynamo traces, run eagerly: it computes what the function that it stands for computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from simba_compile import capture

WHOLE_MIXERS = {"mamba_inner_fn", "mamba2_split_conv1d_scan_combined"}
BATCH, CHANNELS, STATES, TOKENS, WIDTH = 2, 6, 3, 9, 4


def numbers(*shape: int) -> torch.Tensor:
    """In float32, as Hugging Face's scan computes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def cases(name: str) -> list[tuple[tuple, dict[str, Any]]]:
    """Calls of a function, as the models make them; what it writes into is made anew for each."""
    A, D, bias = -numbers(CHANNELS, STATES).exp(), numbers(CHANNELS), numbers(CHANNELS + 1)[1:]
    x, weight = numbers(BATCH, CHANNELS, TOKENS), numbers(CHANNELS, WIDTH)
    if name == "causal_conv1d_fn":
        return [((x, weight, bias, "silu"), {}), ((x, weight, None, None), {})]
    if name == "causal_conv1d_update":
        state = numbers(BATCH, CHANNELS, WIDTH)
        return [((x[..., :1], state, weight, bias, "silu"), {}), ((x[..., :1], state, weight, None, None), {})]
    if name == "mamba_selective_scan":
        B = numbers(BATCH, STATES, TOKENS)
        both = {"delta_softplus": True, "return_last_state": True}
        gated = {"D": D, "z": x.roll(1, 1), "delta_bias": bias}
        return [((x, x.cos(), A, B, B.cos()), {**both, **gated}), ((x, x.abs() / 4, A, B, B), {"D": D})]
    if name == "mamba2_chunk_scan":
        heads = numbers(BATCH, TOKENS, 4, CHANNELS), numbers(BATCH, TOKENS, 4), -numbers(4).exp()
        groups = [numbers(BATCH, TOKENS, 2, STATES)] * 2
        limited = {"D": numbers(4), "dt_bias": numbers(4), "dt_softplus": True, "dt_limit": (0.1, 0.9), "z": None}
        initial = {"initial_states": numbers(BATCH, 4, CHANNELS, STATES), "return_final_states": True}
        return [((*heads, *groups), {"chunk_size": 4, **limited, **more}) for more in ({}, initial)]
    if name == "mamba2_selective_state_update":
        state, x, groups = numbers(BATCH, 4, CHANNELS, STATES), numbers(BATCH, 4, CHANNELS), [numbers(BATCH, 2, STATES)] * 2
        A = -numbers(4).exp()[:, None, None].expand(-1, CHANNELS, STATES)
        dt, D, bias = (numbers(*shape, 1).expand(*shape, CHANNELS) for shape in ((BATCH, 4), (4,), (4,)))
        given = {"D": D, "dt_bias": bias, "dt_softplus": True}
        return [((state, x, dt, A, *groups), {**given, "z": z}) for z in (None, x.cos())]
    B, state = numbers(BATCH, STATES), numbers(BATCH, CHANNELS, STATES)
    step = x[..., 0], x[..., 1]
    return [((state, *step, A, B, B.cos()), {"D": D, "z": x[..., 2], "dt_bias": bias, "dt_softplus": True})]


def results(function: Callable, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    written = {"causal_conv1d_update": 1}.get(function.__name__, 0)
    args = tuple(value.clone() if place == written and isinstance(value, torch.Tensor) else value
                 for place, value in enumerate(args))  # fmt: skip
    out = function(*args, **kwargs)
    return [*(out if isinstance(out, tuple) else (out,)), *(value for value in args if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another backend"])
@pytest.mark.parametrize("name", sorted(set(capture.LIFTS) - WHOLE_MIXERS))
def test_a_substitute_computes_the_same(name: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_lifting", lambda: ours)
    monkeypatch.setattr(capture, "_make_length_dynamic", lambda: True)
    original = getattr(modeling_mamba2 if name.startswith("mamba2") else modeling_mamba, name)
    substitute = capture.LIFTS[name](original)
    for args, kwargs in cases(name):
        for actual, expected in zip(results(substitute, args, kwargs), results(original, args, kwargs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_fused_kernel_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face then takes the path through the functions above."""
    substitute = capture.LIFTS["mamba_inner_fn"](lambda *args, **kwargs: "fused")
    monkeypatch.setattr(capture, "_lifting", lambda: True)
    assert substitute(1, a=2) is None
    monkeypatch.setattr(capture, "_lifting", lambda: False)
    assert substitute(1, a=2) == "fused"

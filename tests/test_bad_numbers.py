"""What the kernels make of NaN and infinities: as in the definition, and where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import INF, NAN, Source, at_level, each_dtype, each_level, needs_native

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding

OPS = torch.ops.simba


def small_scan(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A scan of 2 sequences, 20 tokens, 37 channels and 3 states."""
    source = Source(3, dtype, "plain")
    values = {name: source.normal(2, 20, 37) for name in ("x", "dt")}
    values["A"] = -torch.rand(37, 3, dtype=torch.float64).to(reference.compute_dtype(dtype)) - 0.1
    return values | {name: source.normal(2, 20, 3) for name in ("B", "C")}


@each_level
@each_dtype
@pytest.mark.parametrize("where", ["x", "dt", "z"])
@needs_native
def test_nan_in_one_channel_spreads_to_its_later_tokens_alone(level: int, dtype: torch.dtype, where: str) -> None:
    scan = small_scan(dtype)
    scan["z"] = torch.ones_like(scan["x"])
    scan[where][1, 7, 33] = NAN
    with at_level(level):
        out, state = OPS.selective_scan(
            *(scan[name] for name in ("x", "dt", "A", "B", "C")), None, scan["z"], None, True, None
        )
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[1, 7 if where == "z" else slice(7, None), 33] = True
    assert torch.equal(out.isnan(), bad)
    bad_state = torch.zeros_like(state, dtype=torch.bool)
    bad_state[1, 33] = where != "z"
    assert torch.equal(state.isnan(), bad_state)


@each_level
@pytest.mark.parametrize("where", ["B", "C"])
@needs_native
def test_nan_in_the_projections_spreads_to_all_channels(level: int, where: str) -> None:
    scan = small_scan()
    scan[where][0, 4, 1] = NAN
    with at_level(level):
        out, _ = OPS.selective_scan(*scan.values(), None, None, None, True, None)
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[0, slice(4, None) if where == "B" else 4] = True
    assert torch.equal(out.isnan(), bad)


@each_level
@each_dtype
@needs_native
def test_infinities_do_as_in_the_definition(level: int, dtype: torch.dtype) -> None:
    for where, value in [("x", INF), ("x", -INF), ("dt", INF), ("dt", -INF), ("B", INF), ("C", -INF), ("A", -INF)]:
        scan = small_scan(dtype)
        scan[where][..., 5, 2] = value
        with at_level(level):
            out, state = OPS.selective_scan(*scan.values(), None, None, None, True, None)
        exact, exact_state = reference.selective_scan(*scan.values(), None, None, None, True, None)
        for actual, expected in ((out, exact), (state, exact_state)):
            assert torch.equal(actual.isfinite(), expected.isfinite()), (where, value)
            inf = expected.isinf()
            assert torch.equal(actual[inf], expected[inf]), (where, value)


@each_level
@each_dtype
@pytest.mark.parametrize("pool", reference.POOLS)
@needs_native
def test_influence_of_bad_numbers(level: int, dtype: torch.dtype, pool: str) -> None:
    """A NaN input spoils its token (a NaN step those before it too: they decay through it), and no later one."""
    for where in ("x", "B", "dt", "C"):
        scan = small_scan(dtype)
        scan[where][1, 7 if where != "C" else -1, 2] = NAN
        bad = torch.zeros(2, 20, dtype=torch.bool)
        bad[1, {"x": slice(7, 8), "B": slice(7, 8), "dt": slice(0, 8), "C": slice(None)}[where]] = True
        with at_level(level):
            scores = OPS.influence(*scan.values(), None, True, pool, True)
        assert torch.equal(scores.isnan(), bad), where
        exact = reference.influence(*scan.values(), None, True, pool, True)
        assert torch.equal(exact.isnan(), bad), where
    for where, value in (("x", INF), ("x", -INF), ("dt", -INF)):
        scan = small_scan(dtype)
        scan[where][1, 7, 2] = value
        with at_level(level):
            scores = OPS.influence(*scan.values(), None, True, pool, True)
        exact = reference.influence(*scan.values(), None, True, pool, True)
        assert torch.equal(scores.isnan(), exact.isnan()), (where, value)
        assert torch.equal(scores == INF, exact == INF), (where, value)
        assert scores[1, 8:].isfinite().all() or pool == "max"


@pytest.mark.parametrize("with_native", [True, False])
def test_influence_of_an_infinite_step(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """S_t sums the steps after t: the token's own influence is infinite and not NaN, and later ones do not notice."""
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    scan = small_scan()
    before = OPS.influence(*scan.values(), None, True, "absmax", True)
    scan["dt"][1, 7, 2] = INF
    scores = OPS.influence(*scan.values(), None, True, "absmax", True)
    assert torch.equal(scores[1, 8:], before[1, 8:])
    assert torch.equal(scores[0], before[0])
    assert scores[1, 7] == INF


@each_level
@each_dtype
@needs_native
def test_bad_numbers_in_norm_and_convolution_stay_where_they_are(level: int, dtype: torch.dtype) -> None:
    x = Source(0, dtype, "plain").normal(2, 20, 37)
    x[1, 7, 33] = NAN
    with at_level(level):
        normed = OPS.rms_norm(x, None, 1e-5)
        mixed = OPS.causal_conv1d(x, torch.ones(37, 4), None, True)
    rows = torch.zeros(2, 20, 37, dtype=torch.bool)
    rows[1, 7] = True
    assert torch.equal(normed.isnan(), rows)
    reached = torch.zeros(2, 20, 37, dtype=torch.bool)
    reached[1, 7:11, 33] = True
    assert torch.equal(mixed.isnan(), reached)
    x[1, 7, 33] = -INF
    with at_level(level):
        mixed = OPS.causal_conv1d(x, torch.ones(37, 4), None, True)
    assert torch.equal(mixed.isnan(), reference.causal_conv1d(x, torch.ones(37, 4), None, True).isnan())

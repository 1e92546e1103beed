"""The operators of Mamba-2: native kernels against float64, gradients, the identities of the score, and bad inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OPERATORS, REGISTERED
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    INF,
    NAN,
    UNDIFFERENTIABLE,
    Source,
    assert_laid_out_as_shown,
    assert_near,
    assert_refuses_a_gradient,
    at_level,
    batches,
    each_dtype,
    each_level,
    layouts,
    leaf,
    needs_native,
    seeds,
    spoiled,
    threads,
    wide,
)
from torch import Tensor
from torch.library import opcheck

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.native import ssd as native_ssd
from simba_compile.kernels.ops import dispatch

OPS = torch.ops.simba
LIMITS = [(0.0, INF), (0.3, 1.0), (-INF, INF)]
each_pool = pytest.mark.parametrize("pool", reference.POOLS)


@st.composite
def scans(draw: st.DrawFn, dtype: torch.dtype, longest: int = 150) -> dict[str, Any]:
    """The arguments of `ssd_scan` by name. In layout "pieces", x, B and C are slices of one tensor, as in Hugging Face."""
    layout = draw(layouts)
    source = Source(draw(seeds), dtype, layout)
    batch, tokens, groups = draw(batches), draw(st.integers(1, longest)), draw(st.integers(1, 3))
    heads, p, n = groups * draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    sizes = [heads * p, groups * n, groups * n]
    if layout == "pieces":
        flat = source.normal(batch, tokens, sum(sizes)).split(sizes, -1)
    else:
        flat = tuple(source.laid_out(batch, tokens, size) for size in sizes)
    x, B, C = (value.unflatten(-1, shape) for value, shape in zip(flat, [(heads, p), (groups, n), (groups, n)], strict=True))
    softplus = draw(st.booleans())
    dt = source.laid_out(batch, tokens, heads)
    kind = draw(st.sampled_from([dtype, reference.compute_dtype(dtype)]))
    low, high = draw(st.sampled_from(LIMITS))
    index = source.kept(batch, tokens, draw(st.integers(1, tokens))) if draw(st.booleans()) else None
    return {
        "x": x,
        "dt": dt if softplus else dt.abs() / 4,
        "A": -source.normal(heads, dtype=kind).exp(),
        "B": B,
        "C": C,
        "D": source.normal(heads, dtype=kind) if draw(st.booleans()) else None,
        "dt_bias": source.normal(heads, dtype=kind).abs() / 2 if draw(st.booleans()) else None,
        "softplus": softplus,
        "dt_min": low,
        "dt_max": high,
        "initial": source.normal(batch, heads, p, n, dtype=kind) if draw(st.booleans()) else None,
        "index": index,
    }


def some(dtype: torch.dtype = torch.float32, tokens: int = 40, heads: int = 4) -> dict[str, Any]:
    """The arguments of `ssd_scan`: 2 sequences, channels of 5, 2 groups of 3 states; no option used."""
    source = Source(3, dtype, "plain")
    given_ones = {"x": source.normal(2, tokens, heads, 5), "dt": source.normal(2, tokens, heads)}
    given_ones["A"] = -torch.rand(heads, generator=source.generator, dtype=reference.compute_dtype(dtype)) - 0.1
    given_ones |= {name: source.normal(2, tokens, 2, 3) for name in ("B", "C")}
    options = {"D": None, "dt_bias": None, "softplus": True, "dt_min": 0.0, "dt_max": INF, "initial": None, "index": None}
    return given_ones | options


def scored(scan: dict[str, Any], pool: str = "max", include: bool = True) -> list[Any]:
    """The arguments of `ssd_influence`."""
    names = ("x", "dt", "A", "B", "C", "dt_bias", "softplus", "dt_min", "dt_max")
    return [*(scan[name] for name in names), pool, include]


# --- native kernels against the definitions --------------------------------------------------------------------------


@needs_native
@each_level
@each_dtype
@settings(max_examples=8)
@given(data=st.data())
def test_ssd_scan(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = [*data.draw(scans(dtype)).values()]
    with at_level(level):
        y, state = OPS.ssd_scan(*args)
    exact, exact_state = reference.ssd_scan(*wide(args))
    assert y.dtype == state.dtype == reference.compute_dtype(dtype)
    assert_near(y, exact)
    assert_near(state, exact_state)


@needs_native
@each_level
@each_dtype
@settings(max_examples=4)
@given(data=st.data())
def test_ssd_scan_backward(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    scan = data.draw(scans(dtype))
    args = [value for name, value in scan.items() if name != "index"]
    source, kind = Source(1, dtype, "plain"), reference.compute_dtype(dtype)
    grad = source.normal(*scan["x"].shape, dtype=kind)
    shape = (*grad.shape[:1], *grad.shape[2:], scan["B"].shape[-1])
    grad_state = source.normal(*shape, dtype=kind) if data.draw(st.booleans()) else None
    with at_level(level):
        grads = OPS.ssd_scan_backward(grad, grad_state, *args)
    leaves = [value.requires_grad_() if isinstance(value, Tensor) else value for value in wide(args)]
    y, state = reference.ssd_scan(*leaves)
    total = (y * grad.double()).sum() + (0 if grad_state is None else (state * grad_state.double()).sum())
    given_ones = [value for value in leaves if isinstance(value, Tensor)]
    exact = iter(torch.autograd.grad(total, given_ones, allow_unused=True, materialize_grads=True))
    inputs = [value for value in args if isinstance(value, Tensor) or value is None]
    assert len(grads) == len(inputs) == 8
    for value, gradient in zip(inputs, grads, strict=True):
        if value is None:
            assert gradient.numel() == 0
        else:
            assert_near(gradient, next(exact), torch.float64 if dtype == torch.float64 else torch.float32)


@needs_native
@each_level
@each_dtype
@settings(max_examples=12)
@given(data=st.data())
def test_ssd_influence(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Near as a part of the sum of magnitudes: signs may cancel most of C·B."""
    args = scored(data.draw(scans(dtype)), data.draw(st.sampled_from(reference.POOLS)), data.draw(st.booleans()))
    with at_level(level):
        scores = OPS.ssd_influence(*args)
    exact = reference.ssd_influence(*wide(args))
    x, dt, A, B, C, *rest = wide(args)
    ceiling = reference.ssd_influence(x.abs(), dt, A, B.abs(), C.abs(), *rest[:4], "l2", rest[-1])
    assert scores.dtype == torch.float64 and not scores.isnan().any()
    there = ceiling > -INF
    assert bool((scores[~there] == -INF).all())
    off = ((scores - ceiling).exp() - (exact - ceiling).exp()).abs() / (1 + ceiling.abs())
    assert not there.any() or off[there].max().item() <= (1e-11 if dtype == torch.float64 else 1e-5)


@needs_native
@each_level
@each_dtype
@pytest.mark.parametrize("held_in", ["own", "compute", "strided"])
@settings(max_examples=4)
@given(data=st.data())
def test_ssd_state_update(level: int, dtype: torch.dtype, held_in: str, data: st.DataObject) -> None:
    scan = data.draw(scans(dtype, longest=3))
    kind = reference.compute_dtype(dtype)
    x, dt, B, C = (scan[name][:, -1] for name in ("x", "dt", "B", "C"))
    source = Source(2, dtype if held_in == "own" else kind, "strided" if held_in == "strided" else "plain")
    state = source.laid_out(*x.shape, B.shape[-1])
    args = [state, x, dt, scan["A"], B, C, scan["D"], scan["dt_bias"], scan["softplus"], data.draw(st.booleans())]
    exact_args = wide(args)
    exact_args[0] = state.double().clone()
    with at_level(level):
        out = OPS.ssd_state_update(*args)
    assert out.dtype == dtype
    assert_near(out, reference.ssd_state_update(*exact_args))
    assert_near(state, exact_args[0], kind)


@needs_native
@settings(max_examples=6)
@given(data=st.data())
def test_threads_do_not_change_results(data: st.DataObject) -> None:
    scan = data.draw(scans(torch.float32))
    inputs = [value for name, value in scan.items() if name != "index"]
    results = []
    for count in (1, 2):
        with threads(count):
            dx, ddt, dA, dB, dC, *rest = OPS.ssd_scan_backward(scan["x"], None, *inputs)
            same = [*OPS.ssd_scan(*scan.values()), *(OPS.ssd_influence(*scored(scan, pool)) for pool in reference.POOLS)]
            results.append(([*same, dx, ddt, dA, *rest], [dB, dC]))  # the last two: sums over tasks
    (one, one_summed), (two, two_summed) = results
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(one_summed, two_summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item() if a.numel() else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_of_mamba2_130m(dtype: torch.dtype) -> None:
    """24 heads of 64 channels and one group of 128 states: more than one block of everything, on two threads."""
    source = Source(5, dtype, "plain")
    x, B, C = source.normal(1, 200, 24 * 64 + 2 * 128).split([24 * 64, 128, 128], -1)
    x, B, C = x.unflatten(-1, (24, 64)), B.unflatten(-1, (1, 128)), C.unflatten(-1, (1, 128))
    dt, A = source.normal(1, 200, 24), -source.normal(24, dtype=torch.float32).exp()
    args, index = [x, dt, A, B, C, None, None, True, 0.0, INF], source.kept(1, 200, 130)
    with threads(2):
        y, state = OPS.ssd_scan(*args, None, index)
        grads = OPS.ssd_scan_backward(x.float(), None, *args, None)
    exact, exact_state = reference.ssd_scan(*wide(args), None, index)
    assert_near(y, exact)
    assert_near(state, exact_state)
    expected = reference.ssd_scan_backward(x.double(), None, *wide(args), None)
    for gradient, value in zip(grads, expected, strict=True):
        assert_near(gradient, value, torch.float32)


@pytest.mark.parametrize("with_native", [True, False])
def test_nothing_at_all(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    scan = some(tokens=0)
    y, state = OPS.ssd_scan(*scan.values())
    assert y.shape == (2, 0, 4, 5) and not state.any()
    initial = torch.randn(2, 4, 5, 3)
    assert torch.equal(OPS.ssd_scan(*(scan | {"initial": initial}).values())[1], initial)
    empty = {name: value[:0] if name in ("x", "dt", "B", "C") else value for name, value in some().items()}
    assert OPS.ssd_scan(*empty.values())[0].shape == (0, 40, 4, 5)
    assert OPS.ssd_influence(*scored(empty)).shape == (0, 40)
    gradients = OPS.ssd_scan_backward(empty["x"], None, *list(empty.values())[:-1])
    assert gradients[0].shape == (0, 40, 4, 5) and not gradients[2].any()


@pytest.mark.parametrize("with_native", [True, False])
def test_steps_of_no_channels_have_no_gradient(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    monkeypatch.setattr(torch, "empty", torch.ones)  # what the memory may hold
    scan = {name: value[..., :0] if name == "x" else value for name, value in some().items()}
    gradients = OPS.ssd_scan_backward(scan["x"], None, *list(scan.values())[:-1])
    assert gradients[1].shape == (2, 40, 4) and not any(gradient.any() for gradient in gradients)


@needs_native
def test_inputs_of_several_types_are_widened() -> None:
    scan = some()
    halves = scan | {"x": scan["x"].bfloat16(), "dt": scan["dt"].double()}
    y, _ = OPS.ssd_scan(*halves.values())
    assert_near(y, reference.ssd_scan(*wide([*halves.values()]))[0])


# --- gradients, and what torch asks of operators ---------------------------------------------------------------------


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_of_ssd_scan(with_native: bool, indexed: bool, softplus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    x, dt, B, C = leaf(2, 5, 4, 2), leaf(2, 5, 4, seed=1), leaf(2, 5, 2, 3, seed=2), leaf(2, 5, 2, 3, seed=3)
    A, D, bias = (-leaf(4).exp()).detach().requires_grad_(), leaf(4, seed=4), leaf(4, seed=5)
    index = torch.tensor([[0, 2, 4], [1, 3, 4]]) if indexed else None

    def scan(*values: Tensor) -> tuple[Tensor, ...]:
        return OPS.ssd_scan(*values[:7], softplus, 0.2, 1.1, values[7], index)

    torch.autograd.gradcheck(scan, (x, dt, A, B, C, D, bias, leaf(2, 4, 2, 3, seed=6)))
    plain = (x, dt, A, B, C)
    torch.autograd.gradcheck(lambda *v: OPS.ssd_scan(*v, None, None, softplus, -INF, INF, None, index)[1], plain)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator."""
    scan, index = some(tokens=5), torch.tensor([[0, 2, 3], [1, 2, 4]])
    rich = scan | {"D": torch.randn(4), "dt_bias": torch.randn(4), "initial": torch.randn(2, 4, 5, 3), "index": index}
    grads = {name: rich[name].clone().requires_grad_() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial")}
    backward = [{name: value for name, value in case.items() if name != "index"} for case in (scan, rich)]
    grad, grad_state = torch.randn(2, 5, 4, 5), torch.randn(2, 4, 5, 3)
    one = [rich["x"][:, 0], rich["dt"][:, 0], rich["A"], rich["B"][:, 0], rich["C"][:, 0]]
    return {
        "ssd_scan": [tuple(case.values()) for case in (scan, rich | grads, some(torch.bfloat16, 5))],
        "ssd_scan_backward": [(grad, None, *backward[0].values()), (grad, grad_state, *backward[1].values())],
        "ssd_influence": [tuple(scored(scan)), tuple(scored(rich, "l2", False))],
        "ssd_state_update": [
            (torch.randn(2, 4, 5, 3), *one, rich["D"], rich["dt_bias"], True, log_of_A) for log_of_A in (False, True)
        ],
        "ssd_mixer_update": [
            (torch.randn(2, 4, 5, 3), torch.randn(2, 32, 4), torch.randn(2, *one, 56), torch.randn(32, 4), *rest)
            for one, rest in (
                ((1,), (torch.randn(32), torch.randn(4), torch.randn(4), torch.randn(4), torch.randn(20), 1e-5, 2)),
                ((), (None, None, torch.randn(4), None, None, 1e-5, 0)),
            )
        ],
    }


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str, with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    for args in samples()[name]:
        opcheck(getattr(OPS, name).default, args)
        assert_laid_out_as_shown(getattr(OPS, name), args)


@pytest.mark.parametrize("name", [name for name in UNDIFFERENTIABLE if name.startswith("ssd_")])
def test_to_ask_for_a_gradient_that_there_is_none_of_raises(name: str) -> None:
    assert_refuses_a_gradient(getattr(OPS, name), samples()[name][0])


def test_every_operator_is_checked() -> None:
    names = {name for name in REGISTERED if name.startswith("ssd_")}
    assert names == set(samples())
    assert all(OPERATORS[name].__doc__ for name in names)


@needs_native
@pytest.mark.parametrize("name", sorted(samples()))
def test_without_native_kernels_the_definitions_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> Any:
        args = samples()[name][0]
        out = getattr(OPS, name)(*(value.clone() if isinstance(value, Tensor) else value for value in args))
        return list(out) if isinstance(out, tuple) else [out]

    torch.manual_seed(0)
    expected = call()
    monkeypatch.setattr(binding, "available", lambda: False)
    monkeypatch.setattr(dispatch._native_module(name), name, None)
    torch.manual_seed(0)
    torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5)


# --- the score -------------------------------------------------------------------------------------------------------


@each_pool
@pytest.mark.parametrize("include", [True, False])
@settings(max_examples=12)
@given(data=st.data())
def test_the_score_is_the_gradient_of_the_last_output(pool: str, include: bool, data: st.DataObject) -> None:
    """Σ_t Δy_T(t) = y_T and Δy_T(t) = x_t ⊙ ∂y_T/∂x_t, for the recurrence that the setting of the bias describes."""
    scan = data.draw(scans(torch.float64, longest=20))
    x, A, B, C = (scan[name] for name in ("x", "A", "B", "C"))
    limits = (max(scan["dt_min"], 1e-3), scan["dt_max"])  # Δ of the decay is divided by
    scan |= {"dt_min": limits[0]}

    def step(bias: Tensor | None) -> Tensor:
        dt = scan["dt"] if bias is None else scan["dt"] + bias
        return (F.softplus(dt) if scan["softplus"] else dt).clamp(*limits)

    delta = step(scan["dt_bias"])
    decay = delta if include else step(None)
    scale = (delta / decay)[..., None]  # x scale decay is x Δ: what comes in takes Δ, what decays the other
    x = x.detach().clone().requires_grad_()
    y, _ = OPS.ssd_scan(x * scale, decay, A, B, C, None, None, False, -INF, INF, None, None)
    (slope,) = torch.autograd.grad(y[:, -1].sum(), x)
    parts = (x * slope).detach()
    torch.testing.assert_close(parts.sum(1), y[:, -1].detach(), rtol=1e-9, atol=1e-9)
    each = parts.flatten(2)
    pooled = {"max": each.amax(-1).clamp(min=0), "absmax": each.abs().amax(-1), "l2": each.norm(dim=-1)}[pool]
    scores = OPS.ssd_influence(*scored(scan, pool, include))
    torch.testing.assert_close(scores.exp(), pooled, rtol=1e-8, atol=1e-12)


@needs_native
@each_pool
def test_ranks_are_right_over_200_000_tokens(pool: str) -> None:
    """Equal tokens decay with their distance from the end, one by one, far below the smallest float."""
    tokens, scan = 200_000, some(tokens=1)
    scan |= {name: scan[name].expand(-1, tokens, *scan[name].shape[2:]) for name in ("x", "dt", "B", "C")}
    args = scored(scan, pool)
    scores = OPS.ssd_influence(*args)
    assert scores.isfinite().all()
    assert bool((scores.diff() > 0).all())
    assert scores[:, 0].max() < -1000
    torch.testing.assert_close(scores, reference.ssd_influence(*wide(args)), rtol=1e-6, atol=1e-5)


# --- bad numbers and bad input ---------------------------------------------------------------------------------------


def put(scan: dict[str, Any], where: str, token: int, value: float) -> None:
    """Spoil the last number of a token's second head or group, in the second sequence."""
    scan[where][1, token, 1].view(-1)[-1] = value


@each_level
@each_dtype
@needs_native
@pytest.mark.parametrize("where", ["x", "dt", "B", "C"])
def test_nan_is_seen_where_it_reaches_and_nowhere_else(level: int, dtype: torch.dtype, where: str) -> None:
    """Not in the tokens before it either, which share its chunk's matrix products."""
    scan = some(dtype)
    put(scan, where, 7, NAN)
    bad = torch.zeros(2, 40, 4, 5, dtype=torch.bool)
    later = slice(7, None)
    bad[(1, *{"x": (later, 1, 4), "dt": (later, 1), "B": (later, slice(2, 4)), "C": (7, slice(2, 4))}[where])] = True
    with at_level(level):
        y, state = OPS.ssd_scan(*scan.values())
    assert torch.equal(y.isnan(), bad)
    assert torch.equal(state.isnan(), reference.ssd_scan(*scan.values())[1].isnan())


@each_level
@each_dtype
@needs_native
@pytest.mark.parametrize("value", [INF, -INF])
def test_infinities_are_seen_where_the_definition_has_them(level: int, dtype: torch.dtype, value: float) -> None:
    for where in ("x", "dt", "B", "C"):
        scan = some(dtype)
        put(scan, where, 7, value)
        with at_level(level):
            y, state = OPS.ssd_scan(*scan.values())
        exact, exact_state = reference.ssd_scan(*scan.values())
        assert torch.equal(y.isfinite(), exact.isfinite()), where
        assert torch.equal(state.isfinite(), exact_state.isfinite()), where


@each_level
@each_dtype
@each_pool
@needs_native
def test_influence_of_bad_numbers(level: int, dtype: torch.dtype, pool: str) -> None:
    for where, token in (("x", 7), ("B", 7), ("dt", 7), ("C", -1)):
        for value in (NAN, INF, -INF):
            scan = some(dtype, tokens=70)
            put(scan, where, token, value)
            with at_level(level):
                scores = OPS.ssd_influence(*scored(scan, pool))
            exact = reference.ssd_influence(*scored(scan, pool))
            assert torch.equal(scores.isnan(), exact.isnan()), (where, value)
            assert torch.equal(scores == INF, exact == INF), (where, value)
            assert torch.equal(scores == -INF, exact == -INF), (where, value)


CALLS = {name: cases[-1] for name, cases in samples().items() if hasattr(native_ssd, name)}
CALLS["ssd_scan"] = samples()["ssd_scan"][1]
PARAMETERS = {  # cast from any type
    "ssd_scan": {2, 5, 6, 10},
    "ssd_scan_backward": {0, 1, 4, 7, 8, 12},
    "ssd_influence": {2, 5},
    "ssd_state_update": {0, 3, 6, 7},
}

FREE = {("ssd_scan", 11, "axis 1 too long"), ("ssd_influence", 0, "axis 3 too long")}  # sizes that nothing else shares


@needs_native
@pytest.mark.parametrize("name", sorted(CALLS))
def test_what_c_would_take_on_trust_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: Any) -> None:
        raise AssertionError("C was called")

    monkeypatch.setattr(native_ssd, "call", call)
    run: Callable = getattr(native_ssd, name)
    for place, value in enumerate(CALLS[name]):
        if not isinstance(value, Tensor):
            continue
        for what, bad in spoiled(value):
            if what == "whole numbers" and place in PARAMETERS[name]:
                continue
            if (name, place, what) in FREE:
                continue
            args = [*CALLS[name]]
            args[place] = bad
            with pytest.raises((ValueError, IndexError)):
                run(*args)


@needs_native
def test_bad_sizes_are_named() -> None:
    scan = some()
    with pytest.raises(ValueError, match=r"4 heads and B 3 groups"):
        OPS.ssd_scan(*(scan | {"B": torch.zeros(2, 40, 3, 3), "C": torch.zeros(2, 40, 3, 3)}).values())
    with pytest.raises(ValueError, match=r"index is \(3,\)"):
        OPS.ssd_scan(*(scan | {"index": torch.tensor([0, 1, 2])}).values())
    for bad in (-1, 40, 2**62):
        with pytest.raises(IndexError, match=r"outside 0\.\.39"):
            OPS.ssd_scan(*(scan | {"index": torch.tensor([[0, 1], [2, bad]])}).values())
    with pytest.raises(ValueError, match=r"mean.*absmax"):
        OPS.ssd_influence(*scored(scan, "mean"))

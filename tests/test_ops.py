"""Every operator: gradients, what torch asks of it, and bad inputs."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import OPERATORS, REGISTERED
from kernel_inputs import UNDIFFERENTIABLE, Source, assert_laid_out_as_shown, assert_refuses_a_gradient, leaf, needs_native
from torch import Tensor
from torch.library import opcheck

from simba_compile.kernels.native import binding
from simba_compile.kernels.ops import dispatch

OPS = torch.ops.simba


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_of_selective_scan(
    with_native: bool, indexed: bool, optional: bool, softplus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    x, dt, z, B, C = leaf(2, 5, 3), leaf(2, 5, 3, seed=1), leaf(2, 5, 3, seed=2), leaf(2, 5, 2), leaf(2, 5, 2, seed=4)
    A, D, bias = (-leaf(3, 2).exp()).detach().requires_grad_(), leaf(3), leaf(3, seed=5)
    index = torch.tensor([[0, 2, 4], [1, 3, 4]]) if indexed else None
    if indexed:
        z = leaf(2, 3, 3, seed=2)
    if optional:
        inputs = (x, dt, A, B, C, D, z, bias)
        torch.autograd.gradcheck(lambda *v: OPS.selective_scan(*v, softplus, index), inputs)
    else:
        inputs = (x, dt, A, B, C)
        torch.autograd.gradcheck(lambda *v: OPS.selective_scan(*v, None, None, None, softplus, index), inputs)


def test_gradient_through_the_last_state_alone() -> None:
    x, dt, B = leaf(1, 4, 3), leaf(1, 4, 3, seed=1), leaf(1, 4, 2)
    A, C = -torch.ones(3, 2, dtype=torch.float64), torch.ones(1, 4, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *v: OPS.selective_scan(*v[:2], A, v[2], C, None, None, None, True, None)[1], (x, dt, B))


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_of_causal_conv1d(with_native: bool, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    inputs = (leaf(2, 5, 3), leaf(3, 4), leaf(3, seed=1))
    torch.autograd.gradcheck(lambda *v: OPS.causal_conv1d(*v, silu), inputs)
    torch.autograd.gradcheck(lambda *v: OPS.causal_conv1d(*v, None, silu), inputs[:2])


def test_gradients_of_rms_norm() -> None:
    inputs = (leaf(2, 3, 5), leaf(5))
    torch.autograd.gradcheck(lambda *v: OPS.rms_norm(*v, 1e-3), inputs)
    torch.autograd.gradcheck(lambda x: OPS.rms_norm(x, None, 1e-3), inputs[:1])


def test_gradients_of_gated_norm() -> None:
    inputs = (leaf(2, 3, 6), leaf(2, 3, 6, seed=1), leaf(6))
    torch.autograd.gradcheck(lambda *v: OPS.gated_norm(*v, 1e-3, 2), inputs)
    torch.autograd.gradcheck(lambda *v: OPS.gated_norm(*v, None, 1e-3, 3), inputs[:2])
    rounded = torch.autograd.grad(OPS.gated_norm(*inputs, 1e-3, 2, torch.bfloat16).square().sum(), inputs)
    exact = torch.autograd.grad(OPS.gated_norm(*inputs, 1e-3, 2).square().sum(), inputs)
    for grad, expected in zip(rounded, exact, strict=True):
        assert grad.dtype == torch.float64
        torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.05)


def test_gradients_of_add_norm() -> None:
    residual, x, weight, few = leaf(2, 5, 3), leaf(2, 5, 3, seed=1), leaf(3), leaf(2, 2, 3, seed=2)
    index = torch.tensor([[0, 3], [2, 4]])
    torch.autograd.gradcheck(lambda *v: OPS.add_norm(*v, 1e-3, None), (residual, x, weight))
    torch.autograd.gradcheck(lambda *v: OPS.add_norm(*v, None, 1e-3, index), (residual, few))
    torch.autograd.gradcheck(lambda *v: OPS.add_norm(*v, 1e-3, index)[1], (residual, few, weight))
    halves = few.detach().bfloat16().requires_grad_()
    stream = residual.detach().float().requires_grad_()
    sum(value.float().square().sum() for value in OPS.add_norm(stream, halves, None, 1e-3, index)).backward()  # type: ignore
    exact = torch.autograd.grad(
        sum(value.square().sum() for value in OPS.add_norm(residual, few, None, 1e-3, index)),  # type: ignore[arg-type]
        (residual, few),
    )
    for grad, expected, dtype in zip((stream.grad, halves.grad), exact, (torch.float32, torch.bfloat16), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected, rtol=0.05, atol=0.05)


def test_gradients_of_what_moves_tokens() -> None:
    index, later = torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[0, 3], [2, 4]])
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 1), (leaf(2, 5, 3),))
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 2), (leaf(2, 3, 5),))
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 1), (leaf(1, 5, 3),))
    torch.autograd.gradcheck(lambda full, x: OPS.scatter(full, index, x, 1), (leaf(2, 5, 3), leaf(2, 3, 3, seed=1)))
    torch.autograd.gradcheck(lambda full, x: OPS.scatter(full, index, x, 2), (leaf(2, 3, 5), leaf(2, 3, 3, seed=1)))
    for row in ((3,), (2, 3)):
        torch.autograd.gradcheck(
            lambda base, a, b: OPS.restore(base, [a, b], [index, later]),
            (leaf(2, 5, *row), leaf(2, 3, *row, seed=1), leaf(2, 2, *row)),
        )
    for k in (2, 7):
        torch.autograd.gradcheck(lambda x, k=k: OPS.last_tokens(x, k, 1), (leaf(2, 5, 3),))
    for dim, shape in ((1, (2, 3, 4)), (2, (2, 4, 3))):
        torch.autograd.gradcheck(lambda x, dim=dim: OPS.cache_entries(x, index, 5, dim).nan_to_num(), (leaf(*shape),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_halves_come_in_their_own_type(dtype: torch.dtype) -> None:
    source = Source(0, dtype, "plain")
    x, dt, z = (source.normal(2, tokens, 5).requires_grad_() for tokens in (9, 9, 3))
    B, C = (source.normal(2, 9, 3).requires_grad_() for _ in range(2))
    A = (-torch.rand(5, 3)).requires_grad_()
    out, _ = OPS.selective_scan(x, dt, A, B, C, None, z, None, True, torch.tensor([[0, 3, 8]] * 2))
    out.float().sum().backward()
    assert [v.grad.dtype for v in (x, dt, z, B, C, A)] == [dtype] * 5 + [torch.float32]
    assert all(v.grad.isfinite().all() and v.grad.any() for v in (x, dt, z, B, C, A))
    assert not x.grad[:, 1].any()  # not kept


@pytest.mark.parametrize("name", [name for name in UNDIFFERENTIABLE if not name.startswith("ssd_")])
def test_to_ask_for_a_gradient_that_there_is_none_of_raises(name: str) -> None:
    assert_refuses_a_gradient(getattr(OPS, name), samples()[name][0])


# --- what torch asks of operators ------------------------------------------------------------------------------------


def samples() -> dict[str, list[tuple[Callable[[], tuple]]]]:
    """Arguments for each operator, made when called: opcheck wants fresh ones."""
    f32 = torch.float32

    def n(*shape: int, dtype: torch.dtype = f32, grad: bool = False) -> Tensor:
        return Source(sum(shape), dtype, "plain").normal(*shape).requires_grad_(grad)

    index, later = torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[0, 3], [2, 4]])
    some = lambda g=False, **k: (n(2, 5, 7, grad=g, **k), n(2, 5, 7, grad=g, **k), -n(7, 3).abs(), n(2, 5, 3, **k))  # noqa: E731
    return {
        "influence": [
            (*some(), n(2, 5, 3), n(7), True, "max", False),
            (*some(dtype=torch.bfloat16), n(2, 5, 3, dtype=torch.bfloat16), None, False, "l2", True),
        ],
        "select": [(n(2, 5), 3, 1, 1)],
        "token_scores": [(n(2, 5, 3), 2, c, 3) for c in ("recent", "uniform", "random")],
        "gather": [(n(2, 5, 3, grad=True), index, 1), (n(1, 4, 5), index, 2)],
        "pool_heads": [(n(2, 5), n(2, 5), pool) for pool in ("max", "l2")],
        "enter_experts": [([n(5, 3), n(5, 2)],)],
        "leave_experts": [(n(5, 3),)],
        "cache_entries": [(n(2, 2, 4, 3), torch.arange(4).expand(2, 4), 4, 2)],  # marks are NaN: see test_attention
        "scatter": [(n(2, 5, 3, grad=True), index, n(2, 3, 3, grad=True), 1)],
        "restore": [(n(2, 5, 3, grad=True), [n(2, 3, 3, grad=True), n(2, 2, 3)], [index, later])],
        "last_tokens": [(n(2, 5, 3, grad=True), 2, 1), (n(2, 5, 3), 4, 2)],
        "selective_scan": [
            (*some(True), n(2, 5, 3), n(7, grad=True), n(2, 5, 7), n(7), True, None),
            (*some(True), n(2, 5, 3), None, None, None, False, index),
            (*some(dtype=torch.float16), n(2, 5, 3, dtype=torch.float16), n(7), None, n(7), True, index),
        ],
        "selective_scan_backward": [
            (n(2, 5, 7), n(2, 7, 3), *some(), n(2, 5, 3), n(7), n(2, 5, 7), n(7), True),
            (n(2, 5, 7), None, *some(), n(2, 5, 3), None, None, None, False),
        ],
        "causal_conv1d": [(n(2, 5, 3, grad=True), n(3, 4, grad=True), n(3), True), (n(2, 5, 3), n(3, 4), None, False)],
        "causal_conv1d_backward": [(n(2, 5, 3), n(2, 5, 3), n(3, 4), b, True) for b in (n(3), None)],
        "linear": [
            (n(2, 5, 3, grad=True), n(4, 3, grad=True), n(4, grad=True), n(2, 5, 4, grad=True), None),
            (n(2, 3, 4, grad=True), n(4, 4, grad=True), None, n(2, 5, 4, grad=True), index),
            (n(5, 3), n(4, 3), None, None, None),
        ],
        "rms_norm": [(n(2, 5, 3, grad=True), n(3, grad=True), 1e-5), (n(2, 5, 3), None, 1e-5)],
        "gated_norm": [(n(2, 5, 6, grad=True), n(2, 5, 6, grad=True), w, 1e-5, 2) for w in (n(6, grad=True), None)]
        + [(n(2, 5, 6, grad=True), n(2, 5, 6), None, 1e-5, 2, torch.bfloat16)],
        "add_norm": [
            (n(2, 5, 3, grad=True), n(2, 5, 3, grad=True), n(3, grad=True), 1e-5, None),
            (n(2, 5, 3, grad=True), n(2, 3, 3, dtype=torch.bfloat16), None, 1e-5, index),
        ],
        "state_update": [
            (n(2, 7, 3), n(2, 7), n(2, 7), n(7, 3), n(2, 3), n(2, 3), n(7), n(2, 7), n(7), True, log_of_A)
            for log_of_A in (False, True)
        ],
        "conv_update": [(n(2, 7, 4), n(2, 7), n(7, 4), n(7), True), (n(2, 7, 4), n(2, 7), n(7, 4), None, False)],
        "mixer_update": [
            (n(2, 7, 3), n(2, 7, 4), n(2, *one, 14), n(7, 4), bias, n(8, 7), n(7, 2), bias, n(7, 3), bias)
            for one, bias in (((1,), n(7)), ((), None))
        ],
    }


def test_the_page_of_operators_says_what_there_is() -> None:
    pytest.importorskip("triton")
    page = (Path(__file__).parents[1] / "docs/operators.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(name for name, *_ in rows) == sorted(REGISTERED)
    for name, _, kernels, gradient in rows:
        there = ["C"] * (dispatch._native_module(name) is not None) + ["Triton"] * (name in dispatch._triton_kernels())
        assert kernels == ", ".join(there), name
        known = torch._C._dispatch_has_kernel_for_dispatch_key(f"simba::{name}", "Autograd")
        assert gradient == ("raises" if name in UNDIFFERENTIABLE else "yes" if known else ""), name


def test_help_of_an_operator_is_its_docstring() -> None:
    assert "log |Δy_T(t)[d]|" in pydoc.render_doc(OPS.influence)


def test_every_operator_is_checked() -> None:
    names = {name for name in REGISTERED if not name.startswith("ssd_")}  # tests/test_ssd_kernels.py
    names.remove("no_gradient")  # it only raises
    assert names == set(samples())
    assert all(getattr(OPS, name).default._schema for name in names)
    assert all(OPERATORS[name].__doc__ for name in names)


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str, with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    for args in samples()[name]:
        opcheck(getattr(OPS, name).default, args)
        assert_laid_out_as_shown(getattr(OPS, name), args)


@pytest.mark.parametrize(
    "name",
    ["selective_scan", "influence", "causal_conv1d", "rms_norm", "gated_norm", "add_norm", "state_update", "conv_update"],
)
def test_without_native_kernels_the_definitions_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if binding.available():
        expected = getattr(OPS, name)(*samples()[name][0])
    monkeypatch.setattr(binding, "available", lambda: False)
    monkeypatch.setattr(dispatch._native_module(name), name, None)
    actual = getattr(OPS, name)(*samples()[name][0])
    if binding.library() is not None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- bad inputs ------------------------------------------------------------------------------------------------------

X, B3, A2, I3 = torch.zeros(2, 5, 7), torch.zeros(2, 5, 3), -torch.ones(7, 3), torch.zeros(2, 3, dtype=torch.int64)
REST = (None, None, None, True, None)
BAD = {
    "dtype of dt": (
        "selective_scan",
        (X, X.double(), A2, B3, B3, *REST),
        ValueError,
        r"dt is .*float64.*expected .*float32",
    ),
    "dtype of x": ("selective_scan", (X.long(), X.long(), A2, B3, B3, *REST), ValueError, r"x is .*int64.*expected"),
    "dtype of z": (
        "selective_scan",
        (X, X, A2, B3, B3, None, X.half(), None, True, None),
        ValueError,
        r"z is .*float16",
    ),
    "x without batch": (
        "selective_scan",
        (X[0], X[0], A2, B3[0], B3[0], *REST),
        ValueError,
        r"x is \(5, 7\).*batch, token",
    ),
    "shape of B": (
        "selective_scan",
        (X, X, A2, B3[:, :4], B3, *REST),
        ValueError,
        r"B is \(2, 4, 3\).*expected \(2, 5, 3\)",
    ),
    "states of C": ("selective_scan", (X, X, A2, B3, torch.zeros(2, 5, 4), *REST), ValueError, r"C is \(2, 5, 4\)"),
    "shape of D": (
        "selective_scan",
        (X, X, A2, B3, B3, torch.ones(6), None, None, True, None),
        ValueError,
        r"D is \(6,\)",
    ),
    "channels of A": ("selective_scan", (X, X, A2[:6], B3, B3, *REST), ValueError, r"A is \(6, 3\).*expected \(7, 3\)"),
    "too many states": (
        "selective_scan",
        (X, X, -torch.ones(7, 300), torch.zeros(2, 5, 300), torch.zeros(2, 5, 300), *REST),
        ValueError,
        r"300 states.*1 to 256",
    ),
    "no states": (
        "selective_scan",
        (X, X, -torch.ones(7, 0), torch.zeros(2, 5, 0), torch.zeros(2, 5, 0), *REST),
        ValueError,
        r"0 states",
    ),
    "index too large": ("selective_scan", (X, X, A2, B3, B3, *REST[:4], I3 + 5), IndexError, r"index .*outside 0\.\.4"),
    "index negative": ("selective_scan", (X, X, A2, B3, B3, *REST[:4], I3 - 1), IndexError, r"index .*outside 0\.\.4"),
    "index of integers": (
        "selective_scan",
        (X, X, A2, B3, B3, *REST[:4], I3.int()),
        ValueError,
        r"index is .*int32.*int64",
    ),
    "index of one": ("selective_scan", (X, X, A2, B3, B3, *REST[:4], I3[:1]), ValueError, r"index is \(1, 3\)"),
    "flat index": ("selective_scan", (X, X, A2, B3, B3, *REST[:4], I3[0]), ValueError, r"index is \(3,\)"),
    "influence dtype": (
        "influence",
        (X, X.half(), A2, B3, B3, None, True, "max", True),
        ValueError,
        r"dt is .*float16",
    ),
    "influence bias": (
        "influence",
        (X, X, A2, B3, B3, torch.ones(1), True, "max", True),
        ValueError,
        r"dt_bias is \(1,\)",
    ),
    "influence pool": ("influence", (X, X, A2, B3, B3, None, True, "mean", True), ValueError, r"mean.*absmax"),
    "k too large": ("select", (torch.zeros(2, 5), 6, 0, 1), ValueError, r"k is 6; expected .*5"),
    "k below the ends": ("select", (torch.zeros(2, 5), 2, 2, 1), ValueError, r"k is 2; expected 2 \+ 1"),
    "k negative": ("select", (torch.zeros(2, 5), -1, 0, 0), ValueError, r"k is -1"),
    "ends negative": ("select", (torch.zeros(2, 5), 3, -1, 1), ValueError, r"-1"),
    "flat scores": ("select", (torch.zeros(5), 3, 0, 1), ValueError, r"scores"),
    "criterion": ("token_scores", (X, 2, "newest", 0), ValueError, r"newest.*recent"),
    "uniform too many": ("token_scores", (X, 6, "uniform", 0), ValueError, r"k is 6; expected 0 to 5"),
    "pool of heads": ("pool_heads", (X[..., 0], X[..., 0], "mean"), ValueError, r"mean.*absmax"),
    "gather along the batch": ("gather", (X, I3, 0), ValueError, r"dim is 0.*3 axes"),
    "scatter of fewer channels": ("scatter", (X, I3, X[:, :3, :1], 1), ValueError, r"\(2, 3, 1\); expected \(2, 3, 7\)"),
    "restore of fewer channels": ("restore", (X, [X[:, :3, :1]], [I3]), ValueError, r"\(2, 3, 1\); expected \(2, 3, 7\)"),
    "entries of integers": ("cache_entries", (X.long(), I3, 5, 1), ValueError, r"int64.*floating-point"),
    "last of no axis": ("last_tokens", (X, 3, -2), ValueError, r"dim -2"),
    "gather too far": ("gather", (X, I3 + 5, 1), IndexError, r"outside 0\.\.4"),
    "gather negative": ("gather", (X, I3 - 1, 1), IndexError, r"outside 0\.\.4"),
    "gather of integers": ("gather", (X, I3.int(), 1), ValueError, r"index is .*int32"),
    "gather of batches": ("gather", (torch.zeros(3, 5, 7), I3, 1), ValueError, r"3 sequences and index 2"),
    "gather flat": ("gather", (X, I3[0], 1), ValueError, r"index"),
    "gather too far in axis 2": ("gather", (X, I3 + 7, 2), (IndexError, RuntimeError), r"out of bounds|outside"),
    "scatter too far": ("scatter", (X, I3 + 5, X[:, :3], 1), (IndexError, RuntimeError), r"out of bounds|outside"),
    "conv channels": ("causal_conv1d", (X, torch.ones(6, 4), None, True), ValueError, r"weight is \(6, 4\).*\(7, 4\)"),
    "conv width": ("causal_conv1d", (X, torch.ones(7, 65), None, True), ValueError, r"width of 65.*1 to 64"),
    "conv bias": ("causal_conv1d", (X, torch.ones(7, 4), torch.ones(6), True), ValueError, r"bias is \(6,\)"),
    "conv dtype": ("causal_conv1d", (X.long(), torch.ones(7, 4), None, True), ValueError, r"x is .*int64"),
    "conv rank": ("causal_conv1d", (X[0], torch.ones(7, 4), None, True), ValueError, r"x is \(5, 7\)"),
    "norm weight": ("rms_norm", (X, torch.ones(6), 1e-5), ValueError, r"weight is \(6,\)"),
    "norm dtype": ("rms_norm", (X.long(), None, 1e-5), ValueError, r"int64"),
    "state shape": (
        "state_update",
        (torch.zeros(2, 7, 4), X[:, 0], X[:, 0], A2, B3[:, 0], B3[:, 0], None, None, None, True),
        ValueError,
        r"state is \(2, 7, 4\).*\(2, 7, 3\)",
    ),
    "state dtype of z": (
        "state_update",
        (torch.zeros(2, 7, 3), X[:, 0], X[:, 0], A2, B3[:, 0], B3[:, 0], None, X[:, 0].half(), None, True),
        ValueError,
        r"z is",
    ),
    "window width": (
        "conv_update",
        (torch.zeros(2, 7, 3), X[:, 0], torch.ones(7, 4), None, True),
        ValueError,
        r"state is",
    ),
    "grad dtype": (
        "selective_scan_backward",
        (X.double(), None, X, X, A2, B3, B3, None, None, None, True),
        ValueError,
        r"grad is .*float64",
    ),
    "grad_state shape": (
        "selective_scan_backward",
        (X, torch.zeros(2, 7, 2), X, X, A2, B3, B3, None, None, None, True),
        ValueError,
        r"grad_state is \(2, 7, 2\).*\(2, 7, 3\)",
    ),
    "conv grad shape": ("causal_conv1d_backward", (X[:, :4], X, torch.ones(7, 4), None, True), ValueError, r"grad is"),
    "restore too few": ("restore", (X, [X[:, :3]], []), ValueError, r"1 values and 0 positions"),
    "restore nothing": ("restore", (X, [], []), ValueError, r"0 values and 0 positions"),
}


@needs_native
@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_with_a_readable_message(case: str) -> None:
    name, args, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(OPS, name)(*args)

"""The Triton kernels of both scans, in Triton's interpreter, against their definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import Source, assert_near, layouts, seeds, wide

from simba_compile.kernels import reference
from simba_compile.kernels.gpu import scan, scan_backward, ssd, ssd_backward

dtypes, flags = st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.booleans()
pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a short sequence: the interpreter takes a millisecond for a few operations."""
    monkeypatch.setattr(scan, "MIN_CHUNK", 4)
    monkeypatch.setattr(scan, "CARRY_CHUNKS", 2)
    monkeypatch.setattr(scan_backward, "CHUNK", 4)
    monkeypatch.setattr(ssd, "CHUNK", 16)
    monkeypatch.setattr(ssd, "FLOAT_CHUNK", 16)


def arguments(
    source: Source, tokens: int, channels: int, states: int, rest: bool = True, kept: int | None = None, spread: float = 1.0
) -> list[Any]:
    """x, dt, A, B, C, D, z, dt_bias, softplus, index of one sequence; without `rest`, what may be missing is."""
    x, z = source.pair((1, tokens), channels, channels)
    B, C = source.pair((1, tokens), states, states)
    dt = source.laid_out(1, tokens, channels)
    A = -(spread * source.normal(channels, states, dtype=torch.float32)).exp()
    D, bias = (source.normal(channels, dtype=torch.float32) for _ in range(2))
    # As a column of a wider tensor: not contiguous.
    index = None if kept is None else torch.stack([source.kept(1, tokens, kept)] * 2, 2)[..., 0]
    z = z[:, :kept]
    return [x, dt if rest else dt.abs() / 4, A, B, C, *((D, z, bias) if rest else (None,) * 3), rest, index]


def assert_scan(args: list[Any]) -> None:
    """Outputs and state are near to the definition's."""
    y, state = scan.selective_scan(*args)
    exact_y, exact_state = reference.selective_scan(*wide(args))
    assert y.dtype == args[0].dtype and state.dtype == torch.float32
    assert_near(y, exact_y)
    assert_near(state, exact_state)


@settings(max_examples=4)
@given(seeds, layouts, dtypes, st.integers(1, 13), st.integers(1, 34), st.integers(1, 17), flags, flags)
def test_selective_scan(
    seed: int, layout: str, dtype: torch.dtype, tokens: int, channels: int, states: int, rest: bool, indexed: bool
) -> None:
    source = Source(seed, dtype, layout)
    assert_scan(arguments(source, tokens, channels, states, rest, (tokens + 1) // 2 if indexed else None))


@pytest.mark.parametrize(("tokens", "kept", "states"), [(1, None, 16), (9, 1, 4), (13, 13, 3), (8, None, 33)])
def test_selective_scan_at_the_edges(tokens: int, kept: int | None, states: int) -> None:
    """One token, one kept token, all kept, whole chunks, a lane's states just too many."""
    assert_scan(arguments(Source(0, torch.float32, "plain"), tokens, 3, states, kept=kept))


def test_long_decays() -> None:
    """From states that forget at once (decays of 0) to some that never do."""
    assert_scan(arguments(Source(1, torch.float32, "plain"), 14, 5, 8, spread=5.0))


def test_no_chunks() -> None:
    """A batch that fills the GPU by itself is scanned in one pass, and only then."""
    device = torch.device("cpu")
    assert scan.split(396, 4096, 1, device) == (4096, 1)
    chunk, chunks = scan.split(1, 4096, 48, device)
    assert chunks > 1 and chunk % scan.GROUP == 0 and (chunks - 1) * chunk < 4096 <= chunks * chunk
    x = arguments(Source(2, torch.float32, "plain"), 5, 2, 2)
    whole = scan.selective_scan(*x)
    scan.MIN_CHUNK = 100  # the fixture puts it back
    for one, other in zip(whole, scan.selective_scan(*x), strict=True):
        assert_near(one, other.double())


@settings(max_examples=2)
@given(seeds, layouts, dtypes, st.integers(1, 9), st.integers(1, 17), st.integers(1, 17), flags, flags)
def test_selective_scan_backward(
    seed: int, layout: str, dtype: torch.dtype, tokens: int, channels: int, states: int, rest: bool, with_state: bool
) -> None:
    source = Source(seed, dtype, layout)
    inputs = arguments(source, tokens, channels, states, rest)[:-1]
    grad_state = source.normal(1, channels, states, dtype=torch.float32) if with_state else None
    assert_gradients([source.laid_out(1, tokens, channels), grad_state, *inputs])


def test_selective_scan_backward_over_chunks() -> None:
    """Two blocks of channels, four chunks with a ragged end, everything given."""
    source = Source(3, torch.float32, "pieces")
    inputs = arguments(source, 13, 18, 5)[:-1]
    assert_gradients([source.laid_out(1, 13, 18), source.normal(1, 18, 5), *inputs])


def assert_gradients(args: list[Any]) -> None:
    """Every gradient is near to the definition's."""
    done, exact = scan_backward.selective_scan_backward(*args), reference.selective_scan_backward(*wide(args))
    for actual, right in zip(done, exact, strict=True):
        assert_near(actual, right)


def mamba2(source: Source, tokens: int, groups: int, size: int, states: int, initial: bool, kept: int | None) -> list[Any]:
    """The arguments of `ssd_scan`: two heads."""
    x, dt = source.normal(1, tokens, 2, 2 * size)[..., ::2], source.laid_out(1, tokens, 2)
    B, C = source.normal(1, tokens, groups, 2 * states).split(states, -1)
    A, D, bias = (source.normal(2, dtype=torch.float32) for _ in range(3))
    state = source.normal(1, 2, size, states, dtype=torch.float32) if initial else None
    index = None if kept is None else source.kept(1, tokens, kept)
    limits = (0.1, 1.0) if initial else (0.0, math.inf)
    return [x, dt, -A.exp(), B, C, D if initial else None, bias, True, *limits, state, index]


def assert_ssd(args: list[Any]) -> None:
    """Near to the definition: factors of products in half types are rounded to these, so as a share of the largest."""
    dtype = args[0].dtype
    error = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for actual, exact in zip(ssd.ssd_scan(*args), reference.ssd_scan(*wide(args)), strict=True):
        assert actual.shape == exact.shape and actual.dtype == torch.float32
        assert (actual - exact).abs().max() <= error * exact.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tokens", "groups", "size", "states", "initial", "kept"),
    [
        (torch.float32, 35, 1, 5, 20, True, None),
        (torch.float32, 20, 2, 17, 3, False, 17),
        (torch.float16, 18, 1, 8, 16, True, None),  # the interpreter multiplies the bits of bfloat16, not their values
        (torch.float16, 1, 2, 3, 70, True, 1),
    ],
)
def test_ssd_scan(
    dtype: torch.dtype, tokens: int, groups: int, size: int, states: int, initial: bool, kept: int | None
) -> None:
    assert_ssd(mamba2(Source(4, dtype, "plain"), tokens, groups, size, states, initial, kept))


def test_ssd_scan_shows_a_bad_step() -> None:
    """A NaN in dt is in the outputs from there on, and in the state: the limits do not hide it."""
    args = mamba2(Source(6, torch.float32, "plain"), 20, 1, 5, 4, True, None)
    args[1][0, 3, 1] = math.nan
    (y, state), (exact_y, exact_state) = ssd.ssd_scan(*args), reference.ssd_scan(*wide(args))
    assert exact_y[0, 3:, 1].isnan().all() and y[exact_y.isnan()].isnan().all()
    assert torch.equal(state.isnan(), exact_state.isnan())


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.3, 1.0)])
@pytest.mark.parametrize(
    ("dtype", "tokens", "groups", "size", "states", "given_states"),
    [
        (torch.float32, 35, 1, 5, 20, True),
        (torch.float32, 17, 2, 17, 3, False),
        (torch.float32, 64, 2, 40, 40, True),
        (torch.float16, 18, 1, 70, 16, True),
        (torch.float16, 1, 2, 3, 70, True),
    ],
)
def test_ssd_scan_backward(
    dtype: torch.dtype, tokens: int, groups: int, size: int, states: int, given_states: bool, limits: tuple[float, float]
) -> None:
    """Every gradient, over several chunks, blocks and groups, with steps that the limits cut off."""
    source = Source(5, dtype, "plain")
    x, dt, A, B, C, D, bias, softplus, _, _, initial, _ = mamba2(source, tokens, groups, size, states, given_states, None)
    grad = source.normal(1, tokens, 2, 2 * size, dtype=torch.float32)[..., ::2]
    grad_state = source.normal(1, 2, size, states, dtype=torch.float32) if given_states else None
    args = [grad, grad_state, x, dt, A, B, C, D, bias, softplus, *limits, initial]
    error = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    exact_grads = reference.ssd_scan_backward(*wide(args))
    for actual, exact in zip(ssd_backward.ssd_scan_backward(*args), exact_grads, strict=True):
        assert actual.shape == exact.shape
        if exact.numel():
            assert (actual - exact).abs().max() <= error * exact.abs().max()


def test_ssd_gradient_of_a_decay_does_not_cancel() -> None:
    """At fast decays A's gradient is far below the terms of which running sums would make it; it is right for its size."""
    x = torch.ones(1, 32, 2, 16)
    x[:, ::2] = 1e3
    dt, A = torch.full((1, 32, 2), 3.0), torch.tensor([-4.0, -1e-3])
    args = [x, None, x, dt, A, x[:, :, :1], x[:, :, :1], None, None, False, 0.0, math.inf, None]
    dA, exact = ssd_backward.ssd_scan_backward(*args)[2], reference.ssd_scan_backward(*wide(args))[2]
    torch.testing.assert_close(dA.double(), exact, rtol=1e-5, atol=0)

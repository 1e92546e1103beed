"""The yardstick itself, held to autograd and to the words of docs/method.md."""

from __future__ import annotations

import math

import pytest
import torch
from eager_reference import contributions, counts, influence, select
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DECAYS = ("include", "exclude")
quick = settings(max_examples=40, deadline=None)


@st.composite
def scans(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw the inputs of a small scan in float64, with step sizes from tiny to forgetful and decays apart from them."""
    batch, length, width, states = (draw(st.integers(1, most)) for most in (2, 9, 4, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    step = 10.0 ** draw(st.integers(-3, 1))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, width),
        "delta": step * normal(batch, length, width).exp(),
        "A": -normal(width, states).exp(),
        "B": normal(batch, length, states),
        "C_last": normal(batch, states),
        "delta_decay": step * normal(batch, length, width).exp(),
    }


def decay_as(scan: dict[str, Tensor], dt_bias: str) -> dict[str, Tensor]:
    """Return the scan with S_t over its own step sizes ("include") or over others ("exclude")."""
    return scan if dt_bias == "exclude" else {**scan, "delta_decay": scan["delta"]}


def last_output(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_last: Tensor, delta_decay: Tensor) -> Tensor:
    """y_T of the recurrence, one token after the other; shape (batch, D)."""
    state = x.new_zeros(x.shape[0], *A.shape)
    for t in range(x.shape[1]):
        state = torch.exp(delta_decay[:, t, :, None] * A) * state
        state = state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
    return (state * C_last[:, None, :]).sum(-1)


@pytest.mark.parametrize("dt_bias", DECAYS)
@quick
@given(scan=scans())
def test_contributions_sum_to_the_last_output(dt_bias: str, scan: dict[str, Tensor]) -> None:
    scan = decay_as(scan, dt_bias)
    parts = contributions(**scan)
    torch.testing.assert_close(parts.sum(1), last_output(**scan), rtol=1e-11, atol=1e-12 * parts.abs().max().item())


@pytest.mark.parametrize("dt_bias", DECAYS)
@quick
@given(scan=scans())
def test_contributions_are_inputs_times_gradients(dt_bias: str, scan: dict[str, Tensor]) -> None:
    scan = decay_as(scan, dt_bias)
    x = scan["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(last_output(**scan).sum(), x)  # channels do not mix: row d is that of y_T[d]
    parts = contributions(**scan).detach()
    torch.testing.assert_close(parts, (x * gradient).detach(), rtol=1e-10, atol=1e-12 * parts.abs().max().item())


@quick
@given(scan=scans())
def test_step_sizes_decay_unless_told_otherwise(scan: dict[str, Tensor]) -> None:
    own = decay_as(scan, "include")
    del scan["delta_decay"]
    assert torch.equal(contributions(**scan), contributions(**own))
    assert torch.equal(influence(**scan), influence(**own))


@quick
@given(scan=scans())
def test_influence_is_the_logarithm_of_pooled_contributions(scan: dict[str, Tensor]) -> None:
    parts = contributions(**scan)
    largest = parts.amax(-1)
    pooled = {
        "max": largest.clamp(min=0).log(),  # no positive channel: log 0
        "absmax": parts.abs().amax(-1).log(),
        "l2": parts.norm(dim=-1).log(),
    }
    for pool, expected in pooled.items():
        in_range = (expected > -300) | ((pool == "max") & (largest < 0))  # elsewhere the plain value has underflowed
        scores = influence(**scan, pool=pool)
        torch.testing.assert_close(scores[in_range], expected[in_range], rtol=1e-10, atol=1e-10)


@quick
@given(length=st.integers(2, 50), rate=st.floats(1e-3, 1e4), size=st.floats(1e-3, 1e3))
def test_influence_stays_right_where_exp_underflows(length: int, rate: float, size: float) -> None:
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    A = torch.tensor([[-rate]], dtype=torch.float64)
    expected = math.log(size) - rate * torch.arange(length - 1, -1, -1, dtype=torch.float64)
    for pool in ("max", "absmax", "l2"):
        scores = influence(size * ones, ones, A, ones, ones[:, 0], pool=pool)
        torch.testing.assert_close(scores[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["max", "absmax", "l2"])
def test_a_bad_number_stays_visible_in_the_score(pool: str) -> None:
    x = torch.tensor([[[1.0, 1.0], [math.nan, 1.0], [1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
    ones = torch.ones_like(x)
    scores = influence(x, ones, -ones[0, :2], ones, ones[:, 0], pool=pool)
    assert scores.isnan().tolist() == [[False, True, False, False]]
    assert (scores[0, 3] == -math.inf) == (pool == "max")


@quick
@given(
    length=st.integers(1, 5000),
    n_mixers=st.integers(1, 40),
    keep=st.floats(1e-4, 1),
    schedule=st.sampled_from(["linear", "uniform", "list"]),
    every=st.integers(1, 6),
    min_tokens=st.integers(0, 100),
    ends=st.tuples(st.integers(0, 40), st.integers(1, 40)),
)
def test_counts(
    length: int, n_mixers: int, keep: float, schedule: str, every: int, min_tokens: int, ends: tuple[int, int]
) -> None:
    ratios = [keep ** (mixer / n_mixers) for mixer in range(n_mixers)] if schedule == "list" else schedule
    limits = {"min_tokens": min_tokens, "protect_first": ends[0], "protect_last": ends[1]}
    sizes = counts(length, n_mixers, keep=keep, schedule=ratios, every=every, **limits)
    fewest = min(length, max(min_tokens, sum(ends)))
    assert len(sizes) == n_mixers
    assert all(fewest <= after <= before for before, after in zip([length, *sizes], sizes, strict=False))
    assert all(size == sizes[every * (mixer // every)] for mixer, size in enumerate(sizes))

    reached = keep
    if schedule == "list":
        reached = ratios[every * ((n_mixers - 1) // every)]
    elif schedule == "linear" and n_mixers > 1:
        reached = 1 - (1 - keep) * (every * ((n_mixers - 1) // every)) / (n_mixers - 1)
    # Half a token of rounding, and half a unit of 2^-20 in the ratio.
    assert abs(sizes[-1] - max(fewest, reached * length)) <= 0.5 + length * 2**-21 + 1e-6
    assert counts(length, n_mixers, keep=1.0, every=every, **limits) == [length] * n_mixers


def test_counts_worked_by_hand() -> None:
    assert counts(1000, 4, keep=0.1) == [1000, 700, 400, 100]
    assert counts(1000, 4, keep=0.1, every=2) == [1000, 1000, 400, 400]
    assert counts(1000, 3, keep=0.25, schedule="uniform") == [250, 250, 250]
    assert counts(1000, 3, schedule=[0.5, 0.5, 0.01]) == [500, 500, 32]
    assert counts(1000, 1, keep=0.1, protect_first=90, protect_last=20) == [110]
    assert counts(20, 2, keep=0.1) == [20, 20]
    assert counts(5, 1, keep=0.5, min_tokens=1) == [3]  # halves round up


awkward = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf, math.nan])


@quick
@given(rows=st.integers(1, 30).flatmap(lambda n: st.lists(st.lists(awkward, min_size=n, max_size=n), min_size=1)))
def test_select_keeps_the_best_in_order(rows: list[list[float]]) -> None:
    n = len(rows[0])
    first, last = n // 5, 1 if n < 6 else 2
    k = max(first + last, n // 2)
    chosen = select(torch.tensor(rows, dtype=torch.float64), k, first, last)
    for row, kept in zip(rows, chosen.tolist(), strict=True):
        assert len(kept) == k
        assert kept == sorted(set(kept))
        assert set(range(first)) | set(range(n - last, n)) <= set(kept)
        for stays in (t for t in kept if first <= t < n - last):
            for leaves in set(range(n)) - set(kept):
                higher = row[stays] > row[leaves] or (math.isnan(row[stays]) and not math.isnan(row[leaves]))
                tied = row[stays] == row[leaves] or (math.isnan(row[stays]) and math.isnan(row[leaves]))
                assert higher or (tied and stays > leaves)

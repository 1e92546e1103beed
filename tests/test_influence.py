"""The influence of a token: exact where it can be checked exactly, and right in rank where plain numbers underflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import contributions
from eager_reference import select as select_by_sorting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding

OPS = torch.ops.simba
INF, NAN = math.inf, math.nan
LAYOUTS = ("plain", "transposed", "pieces")


def normal(generator: torch.Generator, layout: str, *shape: int) -> Tensor:
    """A random float64 tensor (batch, token, channel) in one of the layouts."""
    batch, tokens, channels = shape
    if layout == "transposed":
        return torch.randn(batch, channels, tokens, generator=generator, dtype=torch.float64).transpose(1, 2)
    if layout == "pieces":
        return torch.randn(batch, tokens, 3 * channels, generator=generator, dtype=torch.float64).chunk(3, -1)[1]
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def scans(draw: st.DrawFn, channels: int = 20) -> dict[str, Any]:
    """x, dt, A, B, C, dt_bias and softplus of a scan in float64, with decays from 1e-4 to 1e3."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    layout = draw(st.sampled_from(LAYOUTS))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    channels, states = draw(st.integers(1, channels)), draw(st.integers(1, 6))
    decay = 10.0 ** draw(st.floats(-4, 3))
    scan = {name: normal(generator, layout, batch, tokens, channels) for name in ("x", "dt")}
    scan["A"] = -decay * torch.randn(channels, states, generator=generator, dtype=torch.float64).exp()
    scan |= {name: normal(generator, layout, batch, tokens, states) for name in ("B", "C")}
    scan["dt_bias"] = torch.randn(channels, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    scan["softplus"] = draw(st.booleans())
    if not scan["softplus"]:
        scan["dt"] = scan["dt"].abs()
        scan["dt_bias"] = None if scan["dt_bias"] is None else scan["dt_bias"].abs()
    return scan


def steps(scan: dict[str, Any], include: bool = True) -> Tensor:
    """Δ, or what the decay sums up where the bias is left out of it."""
    dt = scan["dt"] if scan["dt_bias"] is None or not include else scan["dt"] + scan["dt_bias"]
    return F.softplus(dt) if scan["softplus"] else dt


def parts(scan: dict[str, Any], include: bool = True) -> Tensor:
    """Each token's part in the last output by the contract."""
    return contributions(
        scan["x"], steps(scan), scan["A"], scan["B"], scan["C"][:, -1], None if include else steps(scan, False)
    )


def last_output(scan: dict[str, Any], include: bool) -> Tensor:
    """y_T by the recurrence that the setting of dt_bias describes: Δ on the input, and in the decay Δ or dt's own."""
    delta, decay = steps(scan), steps(scan, include)
    h = scan["x"].new_zeros(scan["x"].shape[0], *scan["A"].shape)
    for t in range(scan["x"].shape[1]):
        h = torch.exp(decay[:, t, :, None] * scan["A"]) * h
        h = h + (delta[:, t] * scan["x"][:, t])[..., None] * scan["B"][:, t, None]
    return (h * scan["C"][:, -1, None]).sum(-1)


def close(actual: Tensor, expected: Tensor, scale: Tensor, tolerance: float = 1e-11) -> None:
    """Near to each other, as a share of the magnitudes that were summed up."""
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= tolerance * scale + 1e-300).all()), (actual - expected).abs().max()


@given(scan=scans())
def test_contributions_sum_to_the_last_output_of_the_operator(scan: dict[str, Any]) -> None:
    y, _ = OPS.selective_scan(
        *(scan[name] for name in ("x", "dt", "A", "B", "C")), None, None, scan["dt_bias"], scan["softplus"], None
    )
    magnitude = parts({**scan, "x": scan["x"].abs(), "B": scan["B"].abs(), "C": scan["C"].abs()}).sum(1)
    close(parts(scan).sum(1), y[:, -1], magnitude)
    close(parts(scan).sum(1), last_output(scan, True), magnitude)


@pytest.mark.parametrize("include", [True, False])
@given(scan=scans())
def test_contributions_are_inputs_times_gradients(include: bool, scan: dict[str, Any]) -> None:
    scan["x"] = scan["x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(last_output(scan, include).sum(), scan["x"])
    bare = {name: value.abs() if name in ("x", "B", "C") else value for name, value in scan.items()}
    scale = parts({**bare, "x": bare["x"].detach()}, include)
    close(parts(scan, include).detach(), (scan["x"] * gradient).detach(), scale)


@given(scan=scans())
def test_contributions_are_the_gradient_of_the_operator_where_nothing_else_depends_on_x(scan: dict[str, Any]) -> None:
    x = scan["x"] = scan["x"].clone().requires_grad_()
    y, _ = OPS.selective_scan(
        *(scan[name] for name in ("x", "dt", "A", "B", "C")), None, None, scan["dt_bias"], scan["softplus"], None
    )
    (gradient,) = torch.autograd.grad(y[:, -1].sum(), x)
    bare = {name: value.abs() if name in ("x", "B", "C") else value for name, value in scan.items()}
    close(parts(scan).detach(), (x * gradient).detach(), parts({**bare, "x": bare["x"].detach()}))


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("pool", reference.POOLS)
@given(scan=scans(channels=40))
def test_influence_is_the_logarithm_of_pooled_contributions(
    include: bool, with_native: bool, pool: str, scan: dict[str, Any]
) -> None:
    each = parts(scan, include)
    largest = each.abs().amax(-1)
    norm = largest * (each / largest.clamp(min=1e-300)[..., None]).norm(dim=-1)  # squares would underflow
    pooled = {"max": each.amax(-1).clamp(min=0), "absmax": largest, "l2": norm}[pool]
    bare = {name: value.abs() if name in ("x", "B", "C") else value for name, value in scan.items()}
    scale = parts(bare, include).amax(-1)
    with pytest.MonkeyPatch.context() as patch:
        if not with_native:
            patch.setattr(binding, "available", lambda: False)
        scores = OPS.influence(*(scan[name] for name in ("x", "dt", "A", "B", "C", "dt_bias", "softplus")), pool, include)
    assert scores.dtype == torch.float64
    # The exponent grows with the decay, and with it what rounding it costs.
    close(scores.exp(), pooled, scale * (1 + scale.clamp(min=1e-300).log().abs()))
    assert bool((scores > -INF)[(pooled > 1e-200) & (pooled > 1e-9 * scale)].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("include", [True, False])
@settings(max_examples=10)
@given(scan=scans())
def test_influence_in_smaller_types(dtype: torch.dtype, include: bool, scan: dict[str, Any]) -> None:
    for name in ("x", "dt", "B", "C"):
        scan[name] = scan[name].to(dtype)
    rounded = {name: value.double() if isinstance(value, Tensor) else value for name, value in scan.items()}
    order = ("x", "dt", "A", "B", "C", "dt_bias", "softplus")
    scores = OPS.influence(*(scan[name] for name in order), "absmax", include)
    bare = {name: value.abs() if name in ("x", "B", "C") else value for name, value in rounded.items()}
    ceiling = reference.influence(*(bare[name] for name in order), "absmax", include)
    exact = reference.influence(*(rounded[name] for name in order), "absmax", include)
    some = ceiling > -INF
    off = ((scores - ceiling).exp() - (exact - ceiling).exp()).abs() / (1 + ceiling.abs())
    assert not some.any() or off[some].max() < 1e-5


# --- a long sequence -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_scan() -> dict[str, Any]:
    """200,000 tokens whose exp(A·S) is 0 in float32 for almost all of them."""
    generator = torch.Generator().manual_seed(0)
    tokens, channels, states = 200_000, 4, 3
    scan: dict[str, Any] = {
        name: torch.randn(1, tokens, width, generator=generator)
        for name, width in {"x": channels, "dt": channels, "B": states, "C": states}.items()
    }
    scan["A"] = -torch.rand(channels, states, generator=generator) - 0.5
    scan["dt_bias"] = torch.tensor([-4.0, -3.5, -3.8, -4.2])
    return scan


@pytest.mark.parametrize("pool", reference.POOLS)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("with_native", [True, False])
def test_ranks_stay_right_where_float32_reaches_zero(
    long_scan: dict[str, Any], pool: str, include: bool, with_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dt, A, B, C, bias = (long_scan[name].double() for name in ("x", "dt", "A", "B", "C", "dt_bias"))
    delta = F.softplus(dt + bias)
    decay = delta if include else F.softplus(dt)
    S = torch.zeros_like(decay)
    S[:, :-1] = decay[:, 1:].flip(1).cumsum(1).flip(1)
    weight = B * C[:, -1:]
    exponents = S[..., None] * A + weight.abs().log()[:, :, None]  # (batch, token, channel, state)
    top = exponents.amax(-1)
    sums = ((exponents - top[..., None]).exp() * weight.sign()[:, :, None]).sum(-1) * x * delta
    logs = top + sums.abs().log()
    if pool == "max":
        logs = logs.masked_fill(sums <= 0, -INF)
    exact = torch.logsumexp(2 * logs, -1) / 2 if pool == "l2" else logs.amax(-1)
    assert ((A * S[..., None]).amax((-2, -1)).float().exp() == 0).float().mean() > 0.9  # what the test is about

    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    args = (long_scan[name] for name in ("x", "dt", "A", "B", "C", "dt_bias"))
    scores = OPS.influence(*args, True, pool, include)[0]
    exact = exact[0]
    assert torch.equal(scores == -INF, exact == -INF)
    some = exact > -INF
    # Sorted by the exact score, the computed ones rise, but for what float32 costs in the sum of 200,000 steps.
    ordered = scores[some][exact[some].argsort()]
    drop = (ordered.cummax(0).values - ordered).max()
    assert drop < 2e-3 * (1 + decay.sum(1).max() / 1e4)
    for k in (20, 2_000, 100_000):
        ours, theirs = OPS.select(scores[None], k, 0, 1)[0], OPS.select(exact[None], k, 0, 1)[0]
        common = torch.isin(ours, theirs).sum()
        assert common >= k - max(1, k // 2000)
    assert scores[some].unique().numel() > 0.999 * some.sum()  # no ties


# --- select ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("pool", reference.POOLS)
def test_a_bad_number_far_from_the_end_is_seen_in_whichever_channel(pool: str, bad: float) -> None:
    x, B = torch.randn(1, 400, 400), torch.ones(1, 400, 1)
    A = -torch.ones(400, 1)
    A[16:32] = -3.0  # what these channels, one vector of them, add is e^-1600 of what the others do
    x[0, 3, 20] = bad
    scores = OPS.influence(x, torch.full(x.shape, 2.0), A, B, B, None, True, pool, True)[0]
    assert math.isnan(scores[3]) if math.isnan(bad) else scores[3] == INF
    assert bool(scores[torch.arange(400) != 3].isfinite().all())


def chosen(scores: list[float], k: int, first: int = 0, last: int = 1) -> list[int]:
    """The kept tokens of one sequence."""
    return OPS.select(torch.tensor([scores], dtype=torch.float64), k, first, last)[0].tolist()


def test_select_by_hand() -> None:
    assert chosen([3, 1, 2, 0], 3) == [0, 2, 3]  # the last one stays whatever its score
    assert chosen([1, 1, 1, 1, 1], 3) == [2, 3, 4]  # of equals, the later ones
    assert chosen([1, NAN, 5, INF, 0], 2) == [1, 4]  # NaN is the largest
    assert chosen([NAN, 2, NAN, 1, 0], 2) == [2, 4]  # also among NaN the later
    assert chosen([-INF, -INF, 0, -INF, 0], 3) == [2, 3, 4]
    assert chosen([0.0, -0.0, 0.0, 9], 2) == [2, 3]
    assert chosen([0, 0, 9, 9, 0, 0], 4, 2, 2) == [0, 1, 4, 5]  # both ends, nothing else
    assert chosen([0, 0, 8, 9, 0, 0], 5, 2, 2) == [0, 1, 3, 4, 5]
    assert chosen([5, 4, 3], 1) == [2]
    assert chosen([5, 4, 3], 3) == [0, 1, 2]
    assert chosen([7], 1) == [0]
    assert chosen([1, 3, 2], 1, 0, 0) == [1]  # nothing protected
    assert chosen([1, 3, 2], 1, 1, 0) == [0]


awkward = st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0, INF, NAN])


@settings(max_examples=60)
@given(data=st.data())
def test_select_keeps_the_best(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 60))
    rows = data.draw(
        st.lists(st.lists(awkward | st.floats(-3, 3), min_size=tokens, max_size=tokens), min_size=1, max_size=3)
    )
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(1, tokens - first))
    k = data.draw(st.integers(first + last, tokens))
    scores = torch.tensor(rows, dtype=torch.float64)
    before = scores.clone()
    index = OPS.select(scores, k, first, last)
    assert index.dtype == torch.int64
    assert torch.equal(index, select_by_sorting(scores, k, first, last))
    assert torch.equal(index, index.sort(1).values)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_select_takes_scores_of_any_type_and_stride(dtype: torch.dtype) -> None:
    scores = torch.randn(50, 4).to(dtype).t()
    assert torch.equal(OPS.select(scores, 9, 2, 3), select_by_sorting(scores, 9, 2, 3))

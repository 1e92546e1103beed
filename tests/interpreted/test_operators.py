"""Every Triton kernel but the scan's, in Triton's interpreter, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, Source, assert_influence_near, assert_near, layouts, seeds, wide
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.gpu import (
    conv,
    elementary,
    gather,
    influence,
    mixer,
    norm,
    runtime,
    select,
    ssd,
    ssd_backward,
    ssd_influence,
    ssd_state,
    state,
)

triton = pytest.importorskip("triton")
tl = triton.language
NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of a logarithm of zero and the like
    pytest.mark.usefixtures("on_device"),
]
dtypes, pools, flags = st.sampled_from(DTYPES), st.sampled_from(reference.POOLS), st.booleans()
few = settings(max_examples=8)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a short sequence: the interpreter takes a millisecond for a few operations."""
    monkeypatch.setattr(influence, "CHUNK", 8)


# --- elementary ------------------------------------------------------------------------------------------------------


@triton.jit
def _softplus(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, elementary.softplus(tl.load(x + at)))


def test_softplus() -> None:
    """To float32's last few bits, but for exp2's, which multiplies the rounding of its argument."""
    x = torch.cat([torch.linspace(-80, 40, 1000), torch.tensor([0.0, -0.0, 1e-30, 88.0, 1e30, -1e30, INF, -INF])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)), value=NAN)
    out = torch.empty_like(x)
    runtime.launch(_softplus, (1,), x, out, BLOCK=1024)
    exact = torch.where(x > 40, x.double(), torch.log1p(x.double().exp()))
    off = ((out.double() - exact).abs() / (exact + 1e-36))[exact.isfinite()]
    assert bool((off <= 3e-7 + 1e-7 * x[exact.isfinite()].abs().clamp(max=90)).all())
    assert torch.equal(out[~exact.isfinite()].isnan(), exact[~exact.isfinite()].isnan()) and out[1006] == INF


# --- influence -------------------------------------------------------------------------------------------------------


def scored(source: Source, tokens: int, channels: int, states: int, bias: bool, softplus: bool) -> list[Any]:
    """x, dt, A, B, C, dt_bias, softplus of one sequence."""
    x, dt = source.pair((1, tokens), channels, channels)
    B, C = source.pair((1, tokens), states, states)
    A = -source.normal(channels, states, dtype=torch.float32).exp()
    dt_bias = source.normal(channels, dtype=torch.float32) if bias else None
    return [x, dt if softplus else dt / 4, A, B, C, dt_bias if softplus or dt_bias is None else dt_bias / 4, softplus]


@few
@given(seeds, dtypes, layouts, pools, st.integers(1, 27), st.integers(1, 140), st.integers(1, 5), flags, flags, flags)
def test_influence(
    seed: int, dtype: torch.dtype, layout: str, pool: str, tokens: int, channels: int, states: int,
    bias: bool, softplus: bool, include: bool,
) -> None:  # fmt: skip
    """Near to the definition, whatever the sizes, layout and settings."""
    args = scored(Source(seed, dtype, layout), tokens, channels, states, bias, softplus)
    assert_influence_near(influence.influence(*args, pool, include), args, pool, include)


@pytest.mark.parametrize("states", [16, 256])
def test_influence_of_many_states(monkeypatch: pytest.MonkeyPatch, states: int) -> None:
    """The state size of most models, and the largest."""
    monkeypatch.setattr(influence, "CHUNK", 4)
    args = scored(Source(states, torch.float32, "plain"), 4, 3, states, True, True)
    assert_influence_near(influence.influence(*args, "max", True), args, "max", True)


@pytest.mark.parametrize("chunk", [32, 64])
def test_influence_in_long_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """As where warps are many: near to the definition, and a bad number shows wherever in a chunk it stands."""
    monkeypatch.setattr(influence, "chunk_of", lambda *sizes: chunk)
    args = scored(Source(7, torch.float32, "plain"), 70, 5, 3, True, True)
    assert_influence_near(influence.influence(*args, "max", True), args, "max", True)
    args[1] += 30.0
    args[2] -= torch.arange(3)
    args[3][0, 20, 2] = NAN  # of a state that has faded
    score, exact = influence.influence(*args, "max", True), reference.influence(*wide(args), "max", True)
    assert exact[0, 20].isnan() and torch.equal(score.isnan(), exact.isnan())


def test_influence_far_from_the_end() -> None:
    """Behind a million tokens' steps each score is the definition's to 1e-6 of a step, where float32 would tie them all."""
    x, dt, A = torch.ones(2, 40, 1), torch.full((2, 40, 1), 1e-3), torch.tensor([[-1.0]])
    dt[:, -1] = torch.tensor([1e3, 1e6])[:, None]
    score = influence.influence(x, dt, A, x, x, None, False, "max", True)[:, :32]  # the last tile has the million in float32
    exact = reference.influence(*wide([x, dt, A, x, x, None, False]), "max", True)[:, :32]
    torch.testing.assert_close(score, exact, rtol=0, atol=1e-6)
    assert bool((score.diff(dim=1) > 5e-4).all()) and score[1, 0] < -9e5


@pytest.mark.parametrize("pool", ["max", "absmax", "l2"])
def test_influence_where_values_underflow(pool: str) -> None:
    """The slowest channel says nothing, and beside its decay all of the others are 0 in float32."""
    args = scored(Source(3, torch.float32, "plain"), 20, 3, 2, True, True)
    args[2][0], args[2][1:] = -0.01, -90.0
    args[0][..., 0] = 0.0
    assert_influence_near(influence.influence(*args, pool, True), args, pool, True)


def test_influence_shows_an_endless_step_of_a_single_channel() -> None:
    """S is infinite before it, so all states have faded but the slowest, whose exponent 0 · ∞ is no number."""
    args = scored(Source(5, torch.float32, "plain"), 20, 1, 3, False, True)
    args[1][0, 15], args[2][0] = INF, torch.tensor([-1.0, -2.0, -3.0])
    score, exact = influence.influence(*args, "absmax", True), reference.influence(*wide(args), "absmax", True)
    assert exact[:, :15].isnan().all()
    assert torch.equal(score.isnan(), exact.isnan())


@pytest.mark.parametrize(
    ("warps", "tokens", "chunk"), [(40, 4096, 64), (40, 410, 16), (12, 2048, 16), (12, 5000, 32), (1, 1, 16)]
)
def test_chunks_are_short_where_warps_are_few(warps: int, tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """132 multiprocessors: 2112 warps for four a scheduler."""
    monkeypatch.setattr(influence, "CHUNK", 64)
    assert influence.chunk_of(warps, tokens, torch.device("cpu")) == chunk


@pytest.mark.parametrize("where", ["x", "dt", "B"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_influence_shows_bad_numbers(where: str, bad: float) -> None:
    """NaN where the definition has NaN, also at tokens whose states have faded away and are skipped."""
    source = Source(1, torch.float32, "plain")
    x, dt, A, B, C, _, _ = scored(source, 20, 5, 6, False, True)
    dt, A = dt + 30, A - torch.arange(6)
    {"x": x, "dt": dt, "B": B}[where][0, 3, 4] = bad
    score = influence.influence(x, dt, A, B, C, None, True, "absmax", True)
    exact = reference.influence(*wide([x, dt, A, B, C, None, True]), "absmax", True)
    assert exact.isnan().any() or exact.isposinf().any()
    torch.testing.assert_close(score, exact, rtol=1e-6, atol=1e-5, equal_nan=True)


@few
@given(seeds, dtypes, pools, st.integers(1, 20), st.integers(1, 5), st.sampled_from([(1, 1), (2, 1), (4, 2)]), flags, flags)
def test_ssd_influence(
    seed: int, dtype: torch.dtype, pool: str, tokens: int, channels: int, shape: tuple[int, int],
    softplus: bool, include: bool,
) -> None:  # fmt: skip
    """Near to the definition, in the log domain; B and x are pieces of one tensor."""
    (heads, groups), source = shape, Source(seed, dtype, "pieces")
    x, B = source.pair((1, tokens), heads * channels, groups * 3)
    x, B = x.unflatten(2, (heads, channels)), B.unflatten(2, (groups, 3))
    C, dt = source.normal(1, tokens, groups, 3), source.laid_out(1, tokens, heads)
    A, bias = -source.normal(heads, dtype=torch.float32).exp(), source.normal(heads, dtype=torch.float32)
    args = [x, dt, A, B, C, bias, softplus, 0.1, 1.5]
    score = ssd_influence.ssd_influence(*args, pool, include)
    exact = reference.ssd_influence(*wide(args), pool, include)
    # B · C may cancel, to the rounding of its largest terms: compared where it does not.
    product = (B.double() * C.double()[:, -1:]).sum(-1).abs() / (B.double() * C.double()[:, -1:]).abs().sum(-1)
    clear = (product > 1e-2).all(-1)
    torch.testing.assert_close(score[clear], exact[clear], rtol=1e-5, atol=1e-4)


# --- select and gather -----------------------------------------------------------------------------------------------

scores_ = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-52, 1e-320, -INF, INF, NAN, -NAN])


@settings(max_examples=10)
@given(st.data())
def test_select(data: st.DataObject) -> None:
    """The same tokens as sorting gives: ties, signed zeros, NaN, infinities, protected ends, k = 1, k = all."""
    tokens = data.draw(st.integers(1, 30))
    first = data.draw(st.integers(0, tokens))
    last = data.draw(st.integers(0, tokens - first))
    k = data.draw(st.integers(max(1, first + last), tokens) if max(1, first + last) < tokens else st.just(tokens))
    scores = torch.tensor([data.draw(st.lists(scores_, min_size=tokens, max_size=tokens)) for _ in range(2)])
    scores = scores.to(data.draw(st.sampled_from([torch.float64, torch.float32])))
    assert torch.equal(select.select(scores, k, first, last), reference.select(scores, k, first, last))


def test_select_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties and counts carry over from block to block."""
    launch = runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *args, **constants: launch(*args, **{**constants, "BLOCK": 64}))
    scores = Source(0, torch.float64, "plain").normal(2, 200).mul(4).round()
    assert torch.equal(select.select(scores, 77, 1, 1), reference.select(scores, 77, 1, 1))


@few
@given(seeds, layouts, st.integers(1, 2), st.integers(1, 40), st.integers(1, 70), st.sampled_from([*DTYPES, torch.int64]))
def test_gather(seed: int, layout: str, batch: int, tokens: int, channels: int, dtype: torch.dtype) -> None:
    """Exact; also of one sequence for a whole batch, and of (batch, token) alone."""
    source = Source(seed, torch.float32, layout)
    x = source.laid_out(batch, tokens, channels).mul(100).to(dtype)
    index = source.kept(2, tokens, max(1, tokens // 2))[:batch]
    assert torch.equal(gather.gather(x, index, 1), reference.gather(x, index, 1))
    assert torch.equal(gather.gather(x[..., 0], index, 1), reference.gather(x[..., 0], index, 1))
    one = source.kept(3, tokens, tokens)
    assert torch.equal(gather.gather(x[:1], one, 1), reference.gather(x[:1], one, 1))


# --- convolution, norm, decoding -------------------------------------------------------------------------------------


def filters(source: Source, channels: int, width: int, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution."""
    return source.normal(channels, width), source.normal(channels) if bias else None


@few
@given(seeds, dtypes, layouts, st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), flags, flags)
def test_causal_conv1d(
    seed: int, dtype: torch.dtype, layout: str, tokens: int, channels: int, width: int, bias: bool, silu: bool
) -> None:
    """Forward and backward, with sequences shorter than the window and longer than a tile."""
    source = Source(seed, dtype, layout)
    x, grad = source.pair((2, tokens), channels, channels)
    weight, fixed = filters(source, channels, width, bias)
    assert_near(conv.causal_conv1d(x, weight, fixed, silu), reference.causal_conv1d(*wide([x, weight, fixed]), silu))
    got = conv.causal_conv1d_backward(grad, x, weight, fixed, silu)
    exact = reference.causal_conv1d_backward(*wide([grad, x, weight, fixed]), silu)
    for mine, theirs in zip(got, exact, strict=True):
        assert_near(mine, theirs)


@few
@given(seeds, dtypes, layouts, st.integers(1, 150), st.integers(1, 5), flags, flags, st.sampled_from([None, torch.float32]))
def test_conv_update(
    seed: int, dtype: torch.dtype, layout: str, channels: int, width: int, bias: bool, silu: bool, kept: torch.dtype | None
) -> None:
    """The output, and the window moved in place, where that is in another dtype too."""
    source = Source(seed, dtype, layout)
    window = source.laid_out(2, channels, width).to(kept or dtype)
    x = source.laid_out(2, channels)
    weight, fixed = filters(source, channels, width, bias)
    exact = window.double()
    y = conv.conv_update(window, x, weight, fixed, silu)
    assert_near(y, reference.conv_update(exact, *wide([x, weight, fixed]), silu))
    assert torch.equal(window.double(), exact)


@few
@given(seeds, dtypes, layouts, st.sampled_from([(1, 1), (3, 16), (2, 5, 160), (2, 2, 3, 33), (7,)]), flags)
def test_rms_norm(seed: int, dtype: torch.dtype, layout: str, shape: tuple[int, ...], weighted: bool) -> None:
    """Rows of any length and number of axes."""
    source = Source(seed, dtype, layout if len(shape) > 1 else "plain")
    x = source.laid_out(*shape)
    weight = source.normal(shape[-1], dtype=torch.float32) if weighted else None
    assert_near(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(*wide([x, weight]), 1e-5))


@few
@given(
    seeds, dtypes, layouts, st.sampled_from([(3, 16), (2, 5, 36), (2, 2, 3, 12), (6,)]), st.sampled_from([1, 2, 3]), flags,
    st.sampled_from([None, torch.float32]),
)  # fmt: skip
def test_gated_norm(
    seed: int, dtype: torch.dtype, layout: str, shape: tuple[int, ...], groups: int,
    weighted: bool, wider: torch.dtype | None,
) -> None:  # fmt: skip
    """Groups of channels; the gate in a dtype of its own, as Mamba-2's scan gives float32."""
    source = Source(seed, dtype, layout if len(shape) > 1 else "plain")
    x, gate = source.pair(shape[:-1], shape[-1] // groups * groups, shape[-1] // groups * groups)
    x = x if wider is None else x.to(wider)
    weight = source.normal(x.shape[-1], dtype=torch.float32) if weighted else None
    exact = reference.gated_norm(*wide([x, gate, weight]), 1e-5, groups)
    for rounded in (None, dtype):
        y = norm.gated_norm(x, gate, weight, 1e-5, groups, rounded)
        assert y.dtype == (rounded or x.dtype)
        assert_near(y, exact)


@few
@given(
    seeds, dtypes, layouts, st.integers(1, 20), st.sampled_from([1, 16, 36, 160]), flags, flags,
    st.sampled_from([None, torch.float32]),
)  # fmt: skip
def test_add_norm(
    seed: int, dtype: torch.dtype, layout: str, tokens: int, channels: int,
    weighted: bool, gathers: bool, wider: torch.dtype | None,
) -> None:  # fmt: skip
    """The sum, and the norm of what it is when rounded; both of the residual's kept tokens, where some are."""
    source = Source(seed, dtype, layout)
    index = source.kept(2, tokens, (tokens + 1) // 2) if gathers else None
    residual = source.laid_out(2, tokens, channels).to(wider or dtype)
    x = source.laid_out(2, tokens if index is None else index.shape[1], channels)
    weight = source.normal(channels, dtype=torch.float32) if weighted else None
    total, normed = norm.add_norm(residual, x, weight, 1e-5, index)
    assert total.dtype == residual.dtype and normed.dtype == dtype
    assert_near(total, reference.add_norm(*wide([residual, x]), None, 1e-5, index)[0])
    held = total.to(dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts float32 where a GPU rounds it
        held = total.float().view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    assert_near(normed, reference.rms_norm(*wide([held, weight]), 1e-5))


def test_a_position_outside_of_the_residual_counts_as_zeros() -> None:
    x, index = Source(0, torch.float32, "plain").normal(1, 3, 5), torch.tensor([[0, 9, -1]], device=DEVICE)
    total, _ = norm.add_norm(torch.ones(1, 4, 5, device=DEVICE), x, None, 1e-5, index)
    assert torch.equal(total, x + torch.tensor([1.0, 0, 0], device=DEVICE)[None, :, None])


def test_norms_of_rows_longer_than_a_block() -> None:
    """5000 entries: two rounds over the row."""
    x, gate = Source(0, torch.float32, "plain").normal(2, 2, 5000)
    assert_near(norm.rms_norm(x, None, 1e-5), reference.rms_norm(x.double(), None, 1e-5))
    total, normed = norm.add_norm(x, gate, None, 1e-5, None)
    assert_near(total, x.double() + gate.double())
    assert_near(normed, reference.rms_norm(total.double(), None, 1e-5))
    assert_near(norm.gated_norm(x, gate, None, 1e-5, 1), reference.gated_norm(x.double(), gate.double(), None, 1e-5, 1))


def test_norm_wants_whole_groups() -> None:
    with pytest.raises(ValueError, match="10 channels; expected a multiple of 3"):
        norm.gated_norm(torch.ones(2, 10), torch.ones(2, 10), None, 1e-5, 3)


@few
@given(seeds, dtypes, layouts, st.integers(1, 140), st.sampled_from([1, 4, 5, 16, 256]), flags, flags, flags, flags, flags)
def test_state_update(
    seed: int, dtype: torch.dtype, layout: str, channels: int, states: int,
    skip: bool, gate: bool, bias: bool, softplus: bool, log_of_A: bool,
) -> None:  # fmt: skip
    """The output, and the state moved on in place."""
    source = Source(seed, dtype, layout)
    x, z = source.pair((2,), channels, channels)
    dt = source.laid_out(2, channels)
    B, C = source.pair((2,), states, states)
    A = -source.normal(channels, states, dtype=torch.float32).exp()
    D, fixed = (source.normal(channels, dtype=torch.float32) if have else None for have in (skip, bias))
    rest = (D, z if gate else None, fixed if softplus else None, softplus, log_of_A)
    args = [x, dt if softplus else dt.abs(), A, B, C, *rest]
    held = source.laid_out(2, channels, states).float()
    exact = held.double()
    y = state.state_update(held, *args)
    assert_near(y, reference.state_update(exact, *wide(args)))
    assert_near(held, exact)


@few
@given(
    seeds, dtypes, layouts, st.sampled_from([1, 3, 9]), st.sampled_from([1, 5, 70]), st.sampled_from([5, 16, 32]),
    st.sampled_from([1, 3, 16, 300]), flags, flags, flags,
)  # fmt: skip
def test_mixer_update(
    seed: int, dtype: torch.dtype, layout: str, batch: int, channels: int, states: int, rank: int,
    skip: bool, bias: bool, widened: bool,
) -> None:  # fmt: skip
    """What its parts make, whose steps are rounded only where a product of their own makes them, for many sequences."""
    source, kind = Source(seed, dtype, layout), torch.float32 if widened else dtype
    D, dt_bias, conv_bias = (source.normal(channels, dtype=kind) if have else None for have in (skip, bias, bias))
    window, held = source.laid_out(batch, channels, 4), source.laid_out(batch, channels, states).float()
    projected, conv_weight = source.laid_out(batch, 1, 2 * channels), source.normal(channels, 4, dtype=kind)
    x_proj = source.laid_out(rank + 2 * states, channels) * channels**-0.5
    dt_proj, A_log = source.laid_out(channels, rank) * rank**-0.5, source.normal(channels, states, dtype=kind)
    args = [held, window, projected, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D]
    exact, moved, shifted = wide(args), held.clone(), window.clone()

    x, z = projected[:, 0].chunk(2, -1)
    u = conv.conv_update(shifted, x, conv_weight, conv_bias, True)
    low, B, C = torch.nn.functional.linear(u, x_proj).split([rank, states, states], -1)
    dt = low.double() @ dt_proj.double().T
    if batch > mixer.FEW or not state.can_project(states, rank):
        dt = dt.to(dtype)
    expected = state.state_update(moved, u, dt.float(), -A_log.float().exp(), B, C, D, z, dt_bias, True)

    y = mixer.mixer_update(*args)
    assert y.dtype == dtype and torch.equal(window, shifted)
    assert_near(y[:, 0], expected.double())
    assert_near(held, moved.double())
    if dtype == torch.float32:
        assert_near(y, reference.mixer_update(*exact))


def test_mixer_update_within_autocast() -> None:
    """Its products, too, are of its inputs' type."""
    made = []
    for enabled in (False, True):
        normal = Source(0, torch.float32, "plain").normal
        args = [normal(2, 5, 16), normal(2, 5, 4), normal(2, 10), normal(5, 4), None, normal(35, 5), normal(5, 3)]
        with torch.autocast(args[0].device.type, torch.bfloat16, enabled=enabled):
            made.append(mixer.mixer_update(*args, None, normal(5, 16), None))
    assert torch.equal(*made)


def test_heads_that_are_no_multiple_of_the_groups() -> None:
    """Refused, where a kernel would read beyond the last group, and before anything is written."""
    x, dt, B, A = torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4), torch.ones(1, 2, 3, 6), -torch.ones(4)
    held, window = torch.zeros(1, 4, 5, 6), torch.zeros(1, 20 + 36, 4)
    rest, limits = (None, None, True), (0.0, 1.0)
    calls: list[Callable] = [
        lambda: ssd.ssd_scan(x, dt, A, B, B, *rest, *limits, None, None),
        lambda: ssd_backward.ssd_scan_backward(x, None, x, dt, A, B, B, *rest, *limits, None),
        lambda: ssd_influence.ssd_influence(x, dt, A, B, B, None, True, *limits, "max", True),
        lambda: ssd_state.ssd_state_update(held, x[:, 0], dt[:, 0], A, B[:, 0], B[:, 0], *rest),
        lambda: mixer.ssd_mixer_update(
            held, window, torch.ones(1, 20 + 56 + 4), torch.ones(56, 4), None, None, A, None, None, 0.0, 0
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="4 heads; expected a multiple of 3"):
            call()
    with pytest.raises(ValueError, match="20 channels; expected a multiple of 3"):
        window = torch.zeros(1, 32, 4)
        mixer.ssd_mixer_update(held, window, torch.ones(1, 56), torch.ones(32, 4), None, None, A, None, None, 0.0, 3)
    assert not held.any() and not window.any()


@few
@given(
    seeds, dtypes, layouts, st.sampled_from([(1, 1), (2, 1), (6, 2)]), st.integers(1, 40), st.sampled_from([1, 5, 128]),
    st.sampled_from([0, 1, 2]), flags, flags, flags,
)  # fmt: skip
def test_ssd_mixer_update(
    seed: int, dtype: torch.dtype, layout: str, heads: tuple[int, int], size: int, states: int, parts: int,
    skip: bool, bias: bool, widened: bool,
) -> None:  # fmt: skip
    """What its parts make, and in float32 what its definition gives."""
    (count, groups), source, kind = heads, Source(seed, dtype, layout), torch.float32 if widened else dtype
    inner, between = count * size, groups * states
    mixed, norm_groups = inner + 2 * between, parts if inner % max(parts, 1) == 0 else 1
    D, dt_bias = (source.normal(count, dtype=kind) if have else None for have in (skip, bias))
    conv_bias, weight = (source.normal(n, dtype=kind) if bias else None for n in (mixed, inner))
    window, held = source.laid_out(2, mixed, 4), source.laid_out(2, count, size, states).float()
    projected, conv_weight = source.laid_out(2, 1, inner + mixed + count), source.normal(mixed, 4, dtype=kind)
    A_log = source.normal(count, dtype=kind)
    args = [held, window, projected, conv_weight, conv_bias, dt_bias, A_log, D, weight, 1e-5, norm_groups]
    exact, moved, shifted = wide(args), held.clone(), window.clone()

    gate, x, dt = projected[:, 0].split([inner, mixed, count], -1)
    x, B, C = conv.conv_update(shifted, x, conv_weight, conv_bias, True).split([inner, between, between], -1)
    B, C = B.unflatten(-1, (groups, states)), C.unflatten(-1, (groups, states))
    x = x.unflatten(-1, (count, size))
    expected = ssd_state.ssd_state_update(moved, x, dt, A_log, B, C, D, dt_bias, True, True).flatten(1)
    if norm_groups:
        expected = norm.gated_norm(expected, gate, weight, 1e-5, norm_groups)

    y = mixer.ssd_mixer_update(*args)
    assert y.dtype == dtype and torch.equal(window, shifted) and torch.equal(held, moved)
    assert torch.equal(y[:, 0], expected)
    if dtype == torch.float32:
        assert_near(y, reference.ssd_mixer_update(*exact))


@few
@given(
    seeds, dtypes, layouts, st.sampled_from([(1, 1), (2, 1), (6, 2)]), st.integers(1, 40), st.sampled_from([1, 4, 5, 128]),
    flags, flags, flags, flags,
)  # fmt: skip
def test_ssd_state_update(
    seed: int, dtype: torch.dtype, layout: str, heads: tuple[int, int], size: int, states: int,
    skip: bool, bias: bool, softplus: bool, log_of_A: bool,
) -> None:  # fmt: skip
    """The output, and the state moved on in place."""
    (count, groups), source = heads, Source(seed, dtype, layout)
    x, B = source.pair((2,), count * size, groups * states)
    x, B, C = x.unflatten(1, (count, size)), B.unflatten(1, (groups, states)), source.laid_out(2, groups, states)
    dt = source.laid_out(2, count)
    A = -source.normal(count, dtype=torch.float32).exp()
    D, fixed = (source.normal(count, dtype=torch.float32) if have else None for have in (skip, bias))
    args = [x, dt if softplus else dt.abs(), A, B, C, D, fixed if softplus else None, softplus, log_of_A]
    held = source.laid_out(2, count, size, states).float()
    exact = held.double()
    y = ssd_state.ssd_state_update(held, *args)
    assert_near(y, reference.ssd_state_update(exact, *wide(args)))
    assert_near(held, exact)

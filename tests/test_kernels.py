"""Every operator: the native kernel against its definition in float64, gradients, fake shapes, and bad inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import OPERATORS, REGISTERED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from simba_compile.kernels import native, reference

OPS = torch.ops.simba
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf
needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
each_level = pytest.mark.parametrize("level", [0, 1, 2])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextlib.contextmanager
def at_level(level: int) -> Iterator[None]:
    """Run the kernels that were compiled for one level of CPU."""
    library = native.library()
    try:
        if library.simba_set_level(level) != level:
            pytest.skip(f"this CPU does not have level {level}")
        yield
    finally:
        library.simba_set_level(-1)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- inputs ----------------------------------------------------------------------------------------------------------


class Source:
    """Random tensors of one dtype, in a memory layout that the operator has to cope with."""

    def __init__(self, seed: int, dtype: torch.dtype, layout: str) -> None:
        self.generator, self.dtype, self.layout = torch.Generator().manual_seed(seed), dtype, layout

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def laid_out(self, *shape: int) -> Tensor:
        """One tensor of this shape in the layout."""
        return self.pair(shape[:-1], shape[-1], shape[-1])[0]

    def pair(self, rows: tuple[int, ...], first: int, second: int) -> tuple[Tensor, ...]:
        """Two tensors (rows, first) and (rows, second): apart, or pieces of one tensor."""
        if self.layout == "pieces":
            return self.normal(*rows, first + second).split([first, second], -1)
        if self.layout == "transposed":
            return tuple(self.normal(*rows[:-1], n, rows[-1]).transpose(-1, -2) for n in (first, second))
        if self.layout == "strided":  # every other row and every other entry
            wide = [self.normal(*rows[:-1], 2 * rows[-1], 2 * n) for n in (first, second)]
            return tuple(value[..., ::2, ::2] for value in wide)
        return self.normal(*rows, first), self.normal(*rows, second)

    def kept(self, batch: int, tokens: int, count: int) -> Tensor:
        """So many positions of each sequence, ascending."""
        order = [torch.randperm(tokens, generator=self.generator)[:count].sort().values for _ in range(batch)]
        return torch.stack(order) if order else torch.zeros(0, count, dtype=torch.int64)


layouts = st.sampled_from(["plain", "pieces", "transposed", "strided"])
seeds = st.integers(0, 2**32 - 1)
batches, tokens_, channels_, states_ = st.integers(0, 3), st.integers(1, 70), st.integers(1, 150), st.integers(1, 40)


@st.composite
def scans(draw: st.DrawFn, dtype: torch.dtype, indexed: bool = True) -> list[Any]:
    """The arguments of a selective scan: x, dt, A, B, C, D, z, dt_bias, softplus, index."""
    source = Source(draw(seeds), dtype, draw(layouts))
    batch, tokens, channels, states = draw(batches), draw(tokens_), draw(channels_), draw(states_)
    with_D, with_z, with_bias, softplus = (draw(st.booleans()) for _ in range(4))
    x, z = source.pair((batch, tokens), channels, channels)
    dt = source.laid_out(batch, tokens, channels)
    dt = dt if softplus else (dt.abs() / 4)
    B, C = source.pair((batch, tokens), states, states)
    kind = draw(st.sampled_from([dtype, torch.float64 if dtype == torch.float64 else torch.float32]))
    A = -source.normal(channels, states, dtype=kind).exp()
    D = source.normal(channels, dtype=kind) if with_D else None
    dt_bias = source.normal(channels, dtype=kind).abs() / 2 if with_bias else None
    index = None
    if indexed and draw(st.booleans()):
        index = source.kept(batch, tokens, draw(st.integers(1, tokens)))
    return [x, dt, A, B, C, D, z if with_z else None, dt_bias, softplus, index]


def wide(args: list[Any]) -> list[Any]:
    """The same arguments in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def assert_near(actual: Tensor, exact: Tensor, computed_in: torch.dtype | None = None) -> None:
    """Near to a float64 result: a unit of its own last place, and the rounding of what it was computed in."""
    computed_in = computed_in or reference.compute_dtype(actual.dtype)
    assert actual.shape == exact.shape
    error = {torch.float64: 1e-11, torch.float32: 1e-5}[computed_in]
    rtol = max(error, torch.finfo(actual.dtype).eps)
    size = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=error * size, equal_nan=True)


def assert_influence_near(actual: Tensor, args: list[Any], pool: str, include: bool) -> None:
    """Near to the definition in float64, as a part of the sum of magnitudes: signs may cancel most of a value."""
    x, dt, A, B, C, dt_bias, softplus = args
    error = {torch.float64: 1e-11, torch.float32: 1e-5}[reference.compute_dtype(x.dtype)]
    inputs = wide([x, dt, A, B, C, dt_bias, softplus])
    exact = reference.influence(*inputs, pool, include)
    magnitudes = [inputs[0].abs(), inputs[1], inputs[2], inputs[3].abs(), inputs[4].abs(), *inputs[5:]]
    ceiling = reference.influence(*magnitudes, "l2", include)
    assert actual.shape == exact.shape and actual.dtype == torch.float64
    assert bool((actual == -INF)[ceiling == -INF].all())
    some = ceiling > -INF
    off = ((actual - ceiling).exp() - (exact - ceiling).exp()).abs() / (1 + ceiling.abs())
    assert off[some].max().item() <= error if some.any() else True
    assert not actual.isnan().any()


# --- native kernels against the definitions --------------------------------------------------------------------------


@needs_native
@each_level
@each_dtype
@settings(max_examples=10)
@given(data=st.data())
def test_selective_scan(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = data.draw(scans(dtype))
    with at_level(level):
        out, state = OPS.selective_scan(*args)
    exact, exact_state = reference.selective_scan(*wide(args))
    assert out.dtype == dtype and state.dtype == reference.compute_dtype(dtype)
    assert_near(out, exact)
    assert_near(state, exact_state)


@needs_native
@each_level
@each_dtype
@settings(max_examples=5)
@given(data=st.data())
def test_selective_scan_backward(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = data.draw(scans(dtype, indexed=False))[:-1]
    source = Source(1, dtype, "plain")
    grad = source.normal(*args[0].shape)
    kind = reference.compute_dtype(dtype)
    grad_state = source.normal(args[0].shape[0], *args[2].shape, dtype=kind) if data.draw(st.booleans()) else None
    with at_level(level):
        grads = OPS.selective_scan_backward(grad, grad_state, *args)
    leaves = [value.requires_grad_() if isinstance(value, Tensor) else value for value in wide(args)]
    out, state = reference.selective_scan(*leaves)
    total = (out * grad.double()).sum() + (0 if grad_state is None else (state * grad_state.double()).sum())
    given_ones = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    exact = iter(torch.autograd.grad(total, given_ones, allow_unused=True, materialize_grads=True))
    assert len(grads) == 8
    for value, gradient in zip(args[:8], grads, strict=True):
        if value is None:
            assert gradient.numel() == 0
        else:
            assert_near(gradient, next(exact), torch.float64 if dtype == torch.float64 else torch.float32)


@needs_native
@each_level
@each_dtype
@settings(max_examples=15)
@given(data=st.data())
def test_influence(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    x, dt, A, B, C, _, _, dt_bias, softplus, _ = data.draw(scans(dtype))
    pool, include = data.draw(st.sampled_from(reference.POOLS)), data.draw(st.booleans())
    args = [x, dt, A, B, C, dt_bias, softplus]
    with at_level(level):
        scores = OPS.influence(*args, pool, include)
    assert_influence_near(scores, args, pool, include)


@st.composite
def convolutions(draw: st.DrawFn, dtype: torch.dtype) -> list[Any]:
    """The arguments of a causal convolution: x, weight, bias, silu."""
    source = Source(draw(seeds), dtype, draw(layouts))
    channels, width = draw(channels_), draw(st.integers(1, 6))
    weight, bias = source.laid_out(channels, width), source.normal(channels) if draw(st.booleans()) else None
    return [source.laid_out(draw(batches), draw(tokens_), channels), weight, bias, draw(st.booleans())]


@needs_native
@each_level
@each_dtype
@given(data=st.data())
def test_causal_conv1d(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = data.draw(convolutions(dtype))
    with at_level(level):
        out = OPS.causal_conv1d(*args)
    assert out.dtype == dtype and out.is_contiguous()
    assert_near(out, reference.causal_conv1d(*wide(args)))


@needs_native
@each_level
@each_dtype
@settings(max_examples=8)
@given(data=st.data())
def test_causal_conv1d_backward(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    x, weight, bias, silu = data.draw(convolutions(dtype))
    grad = Source(1, dtype, "plain").normal(*x.shape)
    with at_level(level):
        grads = OPS.causal_conv1d_backward(grad, x, weight, bias, silu)
    leaves = [value.double().requires_grad_() for value in (x, weight, bias) if value is not None]
    out = reference.causal_conv1d(*leaves[:2], leaves[2] if bias is not None else None, silu)
    exact = torch.autograd.grad(out, leaves, grad.double())
    for gradient, expected in zip(grads, exact, strict=False):
        assert_near(gradient, expected)
    assert bias is not None or grads[2].numel() == 0


@needs_native
@each_level
@each_dtype
@given(data=st.data())
def test_rms_norm(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    source = Source(data.draw(seeds), dtype, data.draw(layouts))
    shape = [data.draw(batches), data.draw(tokens_), data.draw(channels_)][data.draw(st.integers(0, 1)) :]
    weight = source.normal(shape[-1]) if data.draw(st.booleans()) else None
    x, eps = source.laid_out(*shape), data.draw(st.sampled_from([1e-6, 1e-5, 0.5]))
    with at_level(level):
        out = OPS.rms_norm(x, weight, eps)
    assert out.dtype == dtype
    assert_near(out, reference.rms_norm(x.double(), None if weight is None else weight.double(), eps))


@needs_native
@each_level
@each_dtype
@given(data=st.data())
def test_gated_norm(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    source = Source(data.draw(seeds), dtype, data.draw(layouts))
    groups = data.draw(st.integers(1, 4))
    shape = (data.draw(batches), data.draw(tokens_), groups * data.draw(channels_))
    weight = source.normal(shape[-1]) if data.draw(st.booleans()) else None
    x, gate = source.laid_out(*shape), source.laid_out(*shape).to(data.draw(st.sampled_from([dtype, torch.bfloat16])))
    with at_level(level):
        out = OPS.gated_norm(x, gate, weight, 1e-5, groups)
    assert out.dtype == dtype
    wide = None if weight is None else weight.double()
    assert_near(out, reference.gated_norm(x.double(), gate.to(dtype).double(), wide, 1e-5, groups))


@needs_native
def test_gated_norm_refuses_groups_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="groups is 4; expected a divisor of 6 channels"):
        OPS.gated_norm(torch.ones(2, 6), torch.ones(2, 6), None, 1e-5, 4)


@needs_native
@each_level
@each_dtype
@pytest.mark.parametrize("held_in", ["own", "compute", "strided"])
@settings(max_examples=6)
@given(data=st.data())
def test_state_update(level: int, dtype: torch.dtype, held_in: str, data: st.DataObject) -> None:
    x, dt, A, B, C, D, z, dt_bias, softplus, _ = data.draw(scans(dtype))
    x, dt, B, C, z = (None if value is None else value[:, -1] for value in (x, dt, B, C, z))
    kind = reference.compute_dtype(dtype)
    shape = (x.shape[0], *A.shape)
    source = Source(2, dtype if held_in == "own" else kind, "strided" if held_in == "strided" else "plain")
    state = source.laid_out(*shape)
    args = [state.clone() if held_in != "strided" else state, x, dt, A, B, C, D, z, dt_bias, softplus]
    exact_args = wide(args)
    exact_args[0] = state.double().clone()
    with at_level(level):
        out = OPS.state_update(*args)
    assert_near(out, reference.state_update(*exact_args))
    assert_near(args[0], exact_args[0], kind)


@needs_native
@each_level
@each_dtype
@given(data=st.data())
def test_conv_update(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    x, weight, bias, silu = data.draw(convolutions(dtype))
    source = Source(2, dtype, data.draw(layouts))
    state = source.laid_out(x.shape[0], x.shape[2], weight.shape[1])
    exact_state = state.double().clone()
    with at_level(level):
        out = OPS.conv_update(state, x[:, -1], weight, bias, silu)
    exact = reference.conv_update(exact_state, *wide([x[:, -1], weight, bias]), silu)
    assert_near(out, exact)
    assert torch.equal(state.double(), exact_state)


@needs_native
@each_dtype
@given(data=st.data())
def test_gather(dtype: torch.dtype, data: st.DataObject) -> None:
    source = Source(data.draw(seeds), dtype, data.draw(layouts))
    batch, tokens = data.draw(batches), data.draw(tokens_)
    rest = data.draw(st.lists(st.integers(1, 9), max_size=2))
    shared, dim = data.draw(st.booleans()), data.draw(st.integers(1, 1 + len(rest)))
    shape = [1 if shared else batch, *rest]
    shape.insert(dim, tokens)
    x = source.laid_out(*shape)
    index = torch.randint(0, tokens, (batch, data.draw(st.integers(0, 9))), generator=source.generator)
    rows = [x[0 if shared else i].index_select(dim - 1, index[i]) for i in range(batch)]
    expected = torch.stack(rows) if rows else x.new_empty(0, *shape[1:dim], index.shape[1], *shape[dim + 1 :])
    assert torch.equal(OPS.gather(x, index, dim), expected)
    integers = (x * 100).to(torch.int32)
    assert torch.equal(OPS.gather(integers, index, dim), (expected * 100).to(torch.int32))


@each_dtype
@given(data=st.data())
def test_scatter_and_restore_undo_gathering(dtype: torch.dtype, data: st.DataObject) -> None:
    source = Source(data.draw(seeds), dtype, data.draw(layouts))
    batch, tokens, channels = data.draw(batches), data.draw(tokens_), data.draw(st.integers(1, 9))
    base, other = source.pair((batch, tokens), channels, channels)
    first = source.kept(batch, tokens, data.draw(st.integers(1, tokens)))
    second = OPS.gather(first, source.kept(batch, first.shape[1], data.draw(st.integers(1, first.shape[1]))), 1)
    values = [OPS.gather(other + i, kept, 1) for i, kept in enumerate((first, second))]
    expected = base.clone()
    for b in range(batch):
        expected[b, first[b]] = other[b, first[b]]
    before = base.clone()
    assert torch.equal(OPS.scatter(base, first, values[0], 1), expected)
    for b in range(batch):
        expected[b, second[b]] = (other + 1)[b, second[b]]
    assert torch.equal(OPS.restore(base, values, [first, second]), expected)
    assert torch.equal(base, before)


@given(tokens=st.integers(0, 9), k=st.integers(1, 9), dim=st.integers(0, 2))
def test_last_tokens(tokens: int, k: int, dim: int) -> None:
    x = torch.randn(3, 3, 3).index_select(dim, torch.arange(tokens) % 3)
    out = OPS.last_tokens(x, k, dim)
    have = min(tokens, k)
    assert out.shape[dim] == k
    assert torch.equal(out.narrow(dim, k - have, have), x.narrow(dim, tokens - have, have))
    assert not out.narrow(dim, 0, k - have).any()
    assert out.data_ptr() != x.data_ptr()


@given(tokens=st.integers(1, 90), k=st.integers(1, 90), seed=seeds)
def test_token_scores_choose_what_their_names_say(tokens: int, k: int, seed: int) -> None:
    k = min(k, tokens)
    x = torch.zeros(3, tokens, 2)

    def chosen(criterion: str, seed: int = 0) -> Tensor:
        return OPS.select(OPS.token_scores(x, k, criterion, seed), k, 0, 1)

    assert chosen("recent").tolist() == [list(range(tokens - k, tokens))] * 3
    even = chosen("uniform")[0]
    assert torch.equal(even, (torch.arange(1, k + 1) * tokens) // k - 1)
    assert torch.equal(chosen("random", seed), chosen("random", seed))
    scores = OPS.token_scores(x, k, "random", seed)
    assert tokens < 20 or not torch.equal(scores[0], scores[1])
    assert tokens < 20 or not torch.equal(scores, OPS.token_scores(x, k, "random", seed + 1))


# --- threads, empty batches, what is missing -------------------------------------------------------------------------


@needs_native
@settings(max_examples=10)
@given(data=st.data())
def test_threads_do_not_change_results(data: st.DataObject) -> None:
    args = data.draw(scans(torch.float32))
    x, dt, A, B, C, _, _, dt_bias, softplus, _ = args
    conv = data.draw(convolutions(torch.float32))
    results = []
    for count in (1, 2):
        with threads(count):
            outputs = [*OPS.selective_scan(*args), OPS.causal_conv1d(*conv), OPS.rms_norm(x, None, 1e-5)]
            outputs += [OPS.influence(x, dt, A, B, C, dt_bias, softplus, pool, True) for pool in ("max", "absmax")]
            outputs += [*OPS.causal_conv1d_backward(conv[0], *conv)]
            summed = [*OPS.selective_scan_backward(x, None, *args[:-1])]  # sums over slices of channels
            summed.append(OPS.influence(x, dt, A, B, C, dt_bias, softplus, "l2", True))
        results.append((outputs, summed))
    (one, one_summed), (two, two_summed) = results
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(one_summed, two_summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a[a.isfinite()].abs().max().item() if a.numel() else 0)


@each_dtype
def test_more_than_one_block_of_everything(dtype: torch.dtype) -> None:
    """Longer and wider than any chunk, slice or run of the kernels, on two threads."""
    source = Source(5, dtype, "pieces")
    x, z = source.pair((2, 333), 517, 517)
    B, C = source.pair((2, 333), 16, 16)
    dt, A = source.normal(2, 333, 517), -source.normal(517, 16, dtype=torch.float32).exp()
    index = source.kept(2, 333, 200)
    args = [x, dt, A, B, C, None, z, None, True]
    with threads(2):
        out, state = OPS.selective_scan(*args, index)
        scores = OPS.influence(x, dt, A, B, C, None, True, "l2", True)
    exact, exact_state = reference.selective_scan(*wide(args), index)
    assert_near(out, exact)
    assert_near(state, exact_state)
    assert_influence_near(scores, [x, dt, A, B, C, None, True], "l2", True)


@pytest.mark.parametrize("with_native", [True, False])
def test_empty_batch(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
    x, B = torch.zeros(0, 5, 6), torch.zeros(0, 5, 3)
    A = -torch.ones(6, 3)
    out, state = OPS.selective_scan(x, x, A, B, B, None, x, None, True, None)
    assert out.shape == (0, 5, 6) and state.shape == (0, 6, 3)
    assert OPS.influence(x, x, A, B, B, None, True, "max", True).shape == (0, 5)
    assert OPS.causal_conv1d(x, torch.ones(6, 4), None, True).shape == (0, 5, 6)
    assert OPS.select(torch.zeros(0, 5), 3, 0, 1).shape == (0, 3)
    assert OPS.gather(x, torch.zeros(0, 3, dtype=torch.int64), 1).shape == (0, 3, 6)
    assert OPS.rms_norm(x, torch.ones(6), 1e-5).shape == (0, 5, 6)
    assert OPS.state_update(
        torch.zeros(0, 6, 3), x[:, 0], x[:, 0], A, B[:, 0], B[:, 0], None, None, None, True
    ).shape == (0, 6)
    assert [g.shape[0] for g in OPS.selective_scan_backward(x, None, x, x, A, B, B, None, None, None, True)[:2]] == [
        0,
        0,
    ]


@pytest.mark.parametrize("with_native", [True, False])
def test_no_tokens_at_all(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
    x, B, A = torch.zeros(2, 0, 6), torch.zeros(2, 0, 3), -torch.ones(6, 3)
    out, state = OPS.selective_scan(x, x, A, B, B, None, x, None, True, None)
    assert out.shape == (2, 0, 6) and not state.any()
    assert OPS.causal_conv1d(x, torch.ones(6, 4), None, True).shape == (2, 0, 6)
    assert OPS.rms_norm(x, None, 1e-5).shape == (2, 0, 6)


# --- gradients -------------------------------------------------------------------------------------------------------


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """A float64 leaf that wants a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_of_selective_scan(
    with_native: bool, indexed: bool, optional: bool, softplus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
    x, dt, z, B, C = leaf(2, 5, 3), leaf(2, 5, 3, seed=1), leaf(2, 5, 3, seed=2), leaf(2, 5, 2), leaf(2, 5, 2, seed=4)
    A, D, bias = (-leaf(3, 2).exp()).detach().requires_grad_(), leaf(3), leaf(3, seed=5)
    index = torch.tensor([[0, 2, 4], [1, 3, 4]]) if indexed else None
    if optional:
        inputs = (x, dt, A, B, C, D, z, bias)
        torch.autograd.gradcheck(lambda *v: OPS.selective_scan(*v, softplus, index), inputs)
    else:
        inputs = (x, dt, A, B, C)
        torch.autograd.gradcheck(lambda *v: OPS.selective_scan(*v, None, None, None, softplus, index), inputs)


def test_gradient_through_the_last_state_alone() -> None:
    x, dt, B = leaf(1, 4, 3), leaf(1, 4, 3, seed=1), leaf(1, 4, 2)
    A, C = -torch.ones(3, 2, dtype=torch.float64), torch.ones(1, 4, 2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *v: OPS.selective_scan(*v[:2], A, v[2], C, None, None, None, True, None)[1], (x, dt, B)
    )


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_of_causal_conv1d(with_native: bool, silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
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


def test_gradients_of_what_moves_tokens() -> None:
    index, later = torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[0, 3], [2, 4]])
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 1), (leaf(2, 5, 3),))
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 2), (leaf(2, 3, 5),))
    torch.autograd.gradcheck(lambda x: OPS.gather(x, index, 1), (leaf(1, 5, 3),))
    torch.autograd.gradcheck(lambda full, x: OPS.scatter(full, index, x, 1), (leaf(2, 5, 3), leaf(2, 3, 3, seed=1)))
    torch.autograd.gradcheck(lambda full, x: OPS.scatter(full, index, x, 2), (leaf(2, 3, 5), leaf(2, 3, 3, seed=1)))
    torch.autograd.gradcheck(
        lambda base, a, b: OPS.restore(base, [a, b], [index, later]),
        (leaf(2, 5, 3), leaf(2, 3, 3, seed=1), leaf(2, 2, 3)),
    )
    for k in (2, 7):
        torch.autograd.gradcheck(lambda x, k=k: OPS.last_tokens(x, k, 1), (leaf(2, 5, 3),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_halves_come_in_their_own_type(dtype: torch.dtype) -> None:
    source = Source(0, dtype, "plain")
    x, dt, z = (source.normal(2, 9, 5).requires_grad_() for _ in range(3))
    B, C = (source.normal(2, 9, 3).requires_grad_() for _ in range(2))
    A = (-torch.rand(5, 3)).requires_grad_()
    out, _ = OPS.selective_scan(x, dt, A, B, C, None, z, None, True, torch.tensor([[0, 3, 8]] * 2))
    out.float().sum().backward()
    assert [v.grad.dtype for v in (x, dt, z, B, C, A)] == [dtype] * 5 + [torch.float32]
    assert all(v.grad.isfinite().all() and v.grad.any() for v in (x, dt, z, B, C, A))
    assert not x.grad[:, 1].any()  # not kept


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
        "gated_norm": [(n(2, 5, 6, grad=True), n(2, 5, 6, grad=True), w, 1e-5, 2) for w in (n(6, grad=True), None)],
        "state_update": [(n(2, 7, 3), n(2, 7), n(2, 7), n(7, 3), n(2, 3), n(2, 3), n(7), n(2, 7), n(7), True)],
        "conv_update": [(n(2, 7, 4), n(2, 7), n(7, 4), n(7), True), (n(2, 7, 4), n(2, 7), n(7, 4), None, False)],
    }


def test_every_operator_is_checked() -> None:
    names = {name for name in REGISTERED if not name.startswith("ssd_")}  # tests/test_ssd_kernels.py
    assert names == set(samples())
    assert all(getattr(OPS, name).default._schema for name in names)
    assert all(OPERATORS[name].__doc__ for name in names)


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str, with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
    for args in samples()[name]:
        opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize(
    "name", ["selective_scan", "influence", "causal_conv1d", "rms_norm", "state_update", "conv_update"]
)
def test_without_native_kernels_the_definitions_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.available():
        expected = getattr(OPS, name)(*samples()[name][0])
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, name, None)
    actual = getattr(OPS, name)(*samples()[name][0])
    if native.library() is not None:
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
    "restore too few": ("restore", (X, [X[:, :3]], []), ValueError, r"."),
}


@needs_native
@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_with_a_readable_message(case: str) -> None:
    name, args, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(OPS, name)(*args)


# --- bad numbers -----------------------------------------------------------------------------------------------------


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
        monkeypatch.setattr(native, "available", lambda: False)
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

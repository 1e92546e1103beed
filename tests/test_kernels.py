"""Every native kernel against its definition in float64, at each level of instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    Source,
    assert_influence_near,
    assert_near,
    at_level,
    batches,
    channels_,
    each_dtype,
    each_level,
    layouts,
    needs_native,
    scans,
    seeds,
    threads,
    tokens_,
    wide,
)
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.native import conv as native_conv

OPS = torch.ops.simba


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
@pytest.mark.parametrize("states", [1, 4])  # a state by itself, and a group whose exponents are multiplied on the way
def test_exponentials_over_their_whole_range(level: int, states: int) -> None:
    """Of two tokens the second has no input, so y_2 = exp(Δ_2 A)."""
    exponent = torch.cat([torch.linspace(-110, 100, 4200), torch.tensor([-6e4, -1e4, -0.0, 1e4, 6e4, torch.nan])])
    for more in (torch.empty(0), torch.tensor([-1e30, 1e30])):  # with these, its lanes go another way
        exponents = torch.cat([exponent, more])
        ones = torch.ones_like(exponents)
        x, dt = torch.stack([ones, 0 * ones])[None], torch.stack([ones, -exponents])[None]
        A, B, C = -torch.ones(len(exponents), states), torch.ones(1, 2, states), torch.ones(1, 2, states)
        with at_level(level):
            y = OPS.selective_scan(x, dt, A, B, C, None, None, None, False, None)[0][0, 1].double() / states
        exact = exponents.double().exp()
        normal = (exact > 2.0**-126) & (exact < 2.0**127 / states)
        rounded = 4e-7 + 1.3e-7 * exponents.double().abs()  # 1.5 ulp and the sum's; two roundings of the exponent
        assert ((y / exact - 1).abs() <= rounded)[normal].all()
        assert (y[exact < 2.0**-126] <= 2.0**-126).all()
        assert (y[exact > 2.0**128] == torch.inf).all()
        assert y[exact.isnan()].isnan().all()


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_and_rounded_as_torch_does(level: int, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for factor in (1.0, 1 / 3, 3.0, 1 / 4096, 1 + 3 / 2048):
        expected = (every.float() * factor).to(dtype)
        with at_level(level):
            actual = native_conv.causal_conv1d(every[None, None], torch.full((len(every), 1), factor), None, False)[0, 0]
        same = (actual.view(torch.int16) == expected.view(torch.int16)) | (actual.isnan() & expected.isnan())
        flushed = (every.float() * factor).abs() < torch.finfo(torch.float32).tiny
        assert (same | flushed).all()


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
    other = data.draw(st.sampled_from([dtype, torch.bfloat16, torch.float16]))
    x, gate = source.laid_out(*shape), source.laid_out(*shape).to(other)
    rounded = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))
    with at_level(level):
        out = OPS.gated_norm(x, gate, weight, 1e-5, groups)
        to_that = OPS.gated_norm(x, gate, weight, 1e-5, groups, rounded)
    assert out.dtype == dtype
    wide = None if weight is None else weight.double()
    exact = reference.gated_norm(x.double(), gate.to(dtype).double(), wide, 1e-5, groups)
    assert_near(out, exact)
    assert to_that.dtype == (rounded or dtype)
    assert_near(to_that, exact)


@needs_native
@each_level
@each_dtype
@given(data=st.data())
def test_add_norm(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """The sum, and the norm of what it is when rounded; both of the residual's kept tokens, where some are."""
    source = Source(data.draw(seeds), dtype, data.draw(layouts))
    batch, tokens, channels = data.draw(batches), data.draw(tokens_), data.draw(channels_)
    weight = source.normal(channels) if data.draw(st.booleans()) else None
    kind = data.draw(st.sampled_from([dtype, reference.compute_dtype(dtype)]))
    index = source.kept(batch, tokens, data.draw(st.integers(1, tokens))) if data.draw(st.booleans()) else None
    residual = source.laid_out(batch, tokens, channels).to(kind)
    x = source.laid_out(batch, tokens if index is None else index.shape[1], channels)
    with at_level(level):
        total, normed = OPS.add_norm(residual, x, weight, 1e-5, index)
    assert total.dtype == kind and normed.dtype == dtype
    assert_near(total, reference.add_norm(residual.double(), x.double(), None, 1e-5, index)[0])
    wide = None if weight is None else weight.double()
    assert_near(normed, reference.rms_norm(total.to(dtype).double(), wide, 1e-5))


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
    state, log_of_A = source.laid_out(*shape), data.draw(st.booleans())
    args = [state.clone() if held_in != "strided" else state, x, dt, A, B, C, D, z, dt_bias, softplus, log_of_A]
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
    wide = [value[..., None].expand(-1, -1, -1, tokens) for value in (base, *values)]  # an axis as long as the tokens'
    assert torch.equal(OPS.restore(wide[0], wide[1:], [first, second]), expected[..., None].expand_as(wide[0]))
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
    x, dt, A, B, C, D, z, dt_bias, softplus, index = args
    backward = [x, None, x, dt, A, B, C, D, z if index is None else x, dt_bias, softplus]
    conv = data.draw(convolutions(torch.float32))
    results = []
    for count in (1, 2):
        with threads(count):
            outputs = [*OPS.selective_scan(*args), OPS.causal_conv1d(*conv), OPS.rms_norm(x, None, 1e-5)]
            outputs += OPS.add_norm(x, x, None, 1e-5, None)
            outputs += [OPS.influence(x, dt, A, B, C, dt_bias, softplus, pool, True) for pool in ("max", "absmax")]
            outputs += [*OPS.causal_conv1d_backward(conv[0], *conv)]
            summed = [*OPS.selective_scan_backward(*backward)]  # sums over slices of channels
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
    args = [x, dt, A, B, C, None, z[:, :200], None, True]
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
        monkeypatch.setattr(binding, "available", lambda: False)
    x, B = torch.zeros(0, 5, 6), torch.zeros(0, 5, 3)
    A = -torch.ones(6, 3)
    out, state = OPS.selective_scan(x, x, A, B, B, None, x, None, True, None)
    assert out.shape == (0, 5, 6) and state.shape == (0, 6, 3)
    assert OPS.influence(x, x, A, B, B, None, True, "max", True).shape == (0, 5)
    assert OPS.causal_conv1d(x, torch.ones(6, 4), None, True).shape == (0, 5, 6)
    assert OPS.select(torch.zeros(0, 5), 3, 0, 1).shape == (0, 3)
    assert OPS.gather(x, torch.zeros(0, 3, dtype=torch.int64), 1).shape == (0, 3, 6)
    assert OPS.rms_norm(x, torch.ones(6), 1e-5).shape == (0, 5, 6)
    assert OPS.add_norm(x, x[:, :3], None, 1e-5, torch.zeros(0, 3, dtype=torch.int64))[1].shape == (0, 3, 6)
    out = OPS.state_update(torch.zeros(0, 6, 3), x[:, 0], x[:, 0], A, B[:, 0], B[:, 0], None, None, None, True)
    assert out.shape == (0, 6)
    assert [g.shape[0] for g in OPS.selective_scan_backward(x, None, x, x, A, B, B, None, None, None, True)[:2]] == [
        0,
        0,
    ]


@pytest.mark.parametrize("with_native", [True, False])
def test_no_tokens_at_all(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)
    x, B, A = torch.zeros(2, 0, 6), torch.zeros(2, 0, 3), -torch.ones(6, 3)
    out, state = OPS.selective_scan(x, x, A, B, B, None, x, None, True, None)
    assert out.shape == (2, 0, 6) and not state.any()
    assert OPS.causal_conv1d(x, torch.ones(6, 4), None, True).shape == (2, 0, 6)
    assert OPS.rms_norm(x, None, 1e-5).shape == (2, 0, 6)
    assert OPS.add_norm(x, x, None, 1e-5, None)[0].shape == (2, 0, 6)

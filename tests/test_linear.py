"""The operator of linear layers: the native kernel against float64, gradients, bad inputs, and when it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import NAN, Source, at_level, each_dtype, each_level, layouts, needs_native, seeds, threads
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.native import linear as native_linear

OPS = torch.ops.simba


def assert_product(actual: Tensor, args: tuple[Any, ...]) -> None:
    """Near to the product in float64, as a part of the sum of magnitudes, and rounded to the dtype once."""
    x, weight, bias, add, index = (
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in args
    )
    exact = reference.linear(x, weight, bias, add, index)
    magnitudes = [None if value is None else value.abs() for value in (x, weight, bias, add)]
    size = reference.linear(*magnitudes, index)  # type: ignore[arg-type]
    computed = torch.finfo(reference.compute_dtype(actual.dtype)).eps * x.shape[-1] ** 0.5
    error = 4 * computed * size + torch.finfo(actual.dtype).eps * exact.abs()
    assert actual.shape == exact.shape and actual.is_contiguous()
    assert ((actual.double() - exact).abs() <= error).all()


@st.composite
def products(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, weight, bias, add and index."""
    source = Source(draw(seeds), dtype, draw(layouts))
    batch, tokens, depth, columns = (draw(st.integers(low, high)) for low, high in ((0, 3), (1, 40), (1, 90), (1, 90)))
    x, add = source.laid_out(batch, tokens, depth), source.laid_out(batch, tokens, columns)
    weight = source.laid_out(columns, depth)
    index = None
    if draw(st.booleans()):
        index = source.kept(batch, tokens, draw(st.integers(1, tokens)))
        x = x[:, : index.shape[1]]
    kind = draw(st.sampled_from([dtype, torch.float32]))
    bias = source.normal(columns, dtype=kind) if draw(st.booleans()) else None
    return x, weight, bias, add if index is not None or draw(st.booleans()) else None, index


@needs_native
@each_level
@each_dtype
@settings(max_examples=25)
@given(data=st.data())
def test_linear(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = data.draw(products(dtype))
    with at_level(level), threads(data.draw(st.integers(1, 3))):
        assert_product(native_linear.linear(*args), args)


@needs_native
@each_dtype
@settings(max_examples=25)
@given(data=st.data())
def test_linear_by_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    """Where torch's product is the faster one it is what the operator gives, and its inputs stay as they were."""
    args = data.draw(products(dtype))
    before = [value.clone() if isinstance(value, Tensor) else value for value in args]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_linear, "is_faster", lambda x, weight: False)
        result = OPS.linear(*args)
    assert torch.equal(result, reference.linear(*args)) and result.is_contiguous()
    assert all(value is None or torch.equal(value, old) for value, old in zip(args, before, strict=True))


# rows, depth, columns: a few rows, in one pass and several, in depths that are asked for ahead; weights that fit a cache,
# and that do not; rows that are packed in two strips
FEW = [(1, 700, 515), (3, 400, 401), (7, 1500, 70), (13, 513, 39), (16, 1100, 42)]
SIZES = [*FEW, (19, 300, 80), (75, 401, 403), (1100, 390, 349), (1030, 33, 50)]


@needs_native
@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_in_every_order_of_work(level: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, columns = size
    source = Source(rows, dtype, "plain")
    x, weight, add = source.normal(1, rows, depth), source.normal(columns, depth), source.normal(1, 2 * rows, columns)
    args = (x, weight, source.normal(columns), add, source.kept(1, 2 * rows, rows))
    with at_level(level), threads(2):
        assert_product(native_linear.linear(*args), args)


@needs_native
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_what_is_not_a_number_stays_in_its_row_and_column(rows: int) -> None:
    x, weight = torch.randn(rows, 33), torch.randn(35, 33)
    x[-1, 5], weight[7, 32] = NAN, NAN
    bad = native_linear.linear(x, weight, None, None, None).isnan()
    expected = torch.zeros(rows, 35, dtype=torch.bool)
    expected[-1], expected[:, 7] = True, True
    assert torch.equal(bad, expected)


@needs_native
def test_linear_does_not_depend_on_the_threads() -> None:
    x, weight = torch.randn(50, 400), torch.randn(400, 400)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(native_linear.linear(x, weight, None, None, None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("with_native", [True, False])
def test_gradients(with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(binding, "available", lambda: False)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    index = torch.tensor([[0, 2], [1, 4]])
    for args in (
        (leaf(2, 3, 4), leaf(5, 4), leaf(5), leaf(2, 3, 5), None),
        (leaf(2, 2, 4), leaf(5, 4), None, leaf(2, 5, 5), index),
        (leaf(3, 4), leaf(5, 4), None, None, None),
    ):
        assert torch.autograd.gradcheck(OPS.linear, args)


@needs_native
def test_the_kernel_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(rows: int, dtype: torch.dtype = torch.float32, columns: int = 512, depth: int = 512) -> bool:
        return native_linear.is_faster(torch.zeros(rows, depth, dtype=dtype), torch.zeros(columns, depth, dtype=dtype))

    with threads(2):
        if binding.library().simba_lanes() >= native_linear.AVX2:  # type: ignore[union-attr]
            monkeypatch.setattr(native_linear, "mkl_is_at_home", lambda: True)
            assert not taken(1, columns=1024) and taken(4, columns=1024) and taken(15, columns=1024)
            assert not taken(4) and not taken(16, columns=1024) and not taken(2000)
            monkeypatch.setattr(native_linear, "mkl_is_at_home", lambda: False)
            assert taken(1) and taken(20) and taken(2000)
            assert taken(2000, columns=16) and not taken(20, columns=16)
            for has in (True, False):
                monkeypatch.setattr(native_linear, "has_instructions", lambda dtype, has=has: has)
                assert taken(20, torch.float16) != has and taken(1, torch.float16) != has
                assert taken(20, torch.bfloat16) != has and taken(1, torch.bfloat16)
                assert taken(8, torch.float16, columns=16) != has and not taken(7, torch.float16, columns=16)
        assert not taken(2000, torch.float64) and not taken(0)
        assert not native_linear.is_faster(torch.zeros(2000, 512), torch.zeros(512, 512).t())  # would copy all weights
    with threads(native_linear.THREADS + 1):
        assert not taken(2000)
    with at_level(0):
        assert not taken(2000)


@needs_native
def test_what_is_known_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor as the system says; instructions of halves as torch says, and taken for there where it does not say."""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        is_intel = "GenuineIntel" in cpu.read_text()
        assert native_linear.mkl_is_at_home.__wrapped__() == (is_intel and torch.backends.mkl.is_available())
    for capabilities, bf16, fp16 in (
        ({}, True, True),
        ({"avx512_bf16": False, "avx512_fp16": False}, False, False),
        ({"avx512_bf16": True, "avx512_fp16": False}, True, False),
        ({"avx512_bf16": False, "amx_bf16": True, "avx512_fp16": False, "amx_fp16": False}, True, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known, raising=False)
        has = native_linear.has_instructions.__wrapped__
        assert (has(torch.bfloat16), has(torch.float16)) == (bf16, fp16)


@needs_native
def test_bad_inputs() -> None:
    x, weight, add = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 6, 5)
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    for args, match in (
        ((x, torch.zeros(5, 3), None, None, None), "weight is"),
        ((x, weight.double(), None, None, None), "weight is"),
        ((x, weight, torch.zeros(4), None, None), "bias is"),
        ((x, weight, None, add, None), "add is"),
        ((x, weight, None, None, index), "index is"),
        ((x, weight, None, add, index[:, :2]), "index is"),
        ((x, weight, None, add[:1], index), "add is"),
        ((x, weight, None, add, index.int()), "index is"),
        ((x.int(), weight.int(), None, None, None), "x is"),
    ):
        with pytest.raises(ValueError, match=match):
            native_linear.linear(*args)
    with pytest.raises(IndexError, match=r"outside 0\.\.5"):
        native_linear.linear(x, weight, None, add, index + 1)


@pytest.mark.parametrize("faster", [False, True])
def test_what_does_not_fit_is_refused_whatever_runs(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would repeat a bias of one number or a smaller `add`, and not look at an index without one."""
    monkeypatch.setattr(native_linear, "is_faster", lambda *args: faster)
    x, weight, add = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 6, 5)
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    for args in (
        (x, torch.zeros(4), None, None, None),
        (x, weight, torch.zeros(1), None, None),
        (x, weight, None, add[:, :1], None),
        (x, weight, None, torch.zeros(5, 2, 3, 5), None),
        (x, weight, None, add[:, :3].double(), None),
        (x, weight, None, None, index),
        (x, weight, None, add, index[:, :2]),
        (x, weight, None, add[:1], index),
        (x, weight, None, add[..., :1], index),
        (x, weight, None, add.double(), index),
        (x[0], weight, None, add[0], index[0]),
        (x[..., :3], weight, torch.zeros(5), None, None),
        (x, weight.double(), torch.zeros(5), None, None),
    ):
        with pytest.raises(ValueError, match="expected"):
            OPS.linear(*args)


def test_autocast_is_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator computes in its inputs' type, and leaves no copy of a weight to a later call in the same region."""
    monkeypatch.setattr(native_linear, "is_faster", lambda x, weight: False)
    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS.linear(x, weight, None, None, None).dtype == torch.float32
        assert F.linear(x, weight).requires_grad

"""Inputs of the kernels, in every dtype and layout, and what "near" is: what the tests of operators share."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.ops.dispatch import places_written

OPS = torch.ops.simba
DEVICE = os.environ.get("SIMBA_TEST_DEVICE", "cpu")  # "cuda": `tests/interpreted` runs on a GPU, compiled
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf
needs_native = pytest.mark.skipif(not binding.available(), reason="the native kernels were not built")
each_level = pytest.mark.parametrize("level", [0, 1, 2])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextlib.contextmanager
def at_level(level: int) -> Iterator[None]:
    """Run the kernels that were compiled for one level of CPU."""
    library = binding.library()
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
    """Random tensors of one dtype on `DEVICE`, in a memory layout that the operator has to cope with."""

    def __init__(self, seed: int, dtype: torch.dtype, layout: str) -> None:
        self.generator, self.dtype, self.layout = torch.Generator().manual_seed(seed), dtype, layout

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn.to(DEVICE, dtype or self.dtype)

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
        order = [torch.randperm(tokens, generator=self.generator, device="cpu")[:count] for _ in range(batch)]
        return torch.stack(order).sort().values.to(DEVICE) if order else torch.zeros(0, count, dtype=torch.int64)


def spoiled(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor with something wrong about it."""
    yield "elsewhere", value.to("meta")
    yield "another rank", value[None]
    yield "no axis", value.new_zeros(())
    for axis in range(value.dim()):
        sizes = list(value.shape)
        sizes[axis] += 1
        yield f"axis {axis} too long", torch.zeros(sizes, dtype=value.dtype)
    yield "whole numbers", value.to(torch.int32)


def assert_laid_out_as_shown(operator: Any, args: tuple[Any, ...]) -> None:
    """Results have the strides that fake tensors gave them, also of inputs whose last two axes are swapped in memory."""

    def swapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.mT.contiguous().mT if value.dim() > 1 else value.clone()

    given, mode = tree_map(swapped, args), FakeTensorMode()
    shown_args = tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, given)
    with mode:
        shown = tree_leaves(operator(*shown_args))
    for value, fake in zip(tree_leaves(operator(*given)), shown, strict=True):
        assert value.shape == fake.shape and value.dtype == fake.dtype
        pairs = [(a, b) for a, b, size in zip(value.stride(), fake.stride(), value.shape, strict=True) if size > 1]
        assert value.numel() == 0 or all(a == b for a, b in pairs), f"{value.stride()} and not {fake.stride()}"


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
        z = z[:, : index.shape[1]]
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


UNDIFFERENTIABLE = (
    *("influence", "ssd_influence", "token_scores", "pool_heads", "conv_update", "state_update", "ssd_state_update"),
    *("mixer_update", "ssd_mixer_update", "selective_scan_backward", "ssd_scan_backward", "causal_conv1d_backward"),
)


def assert_refuses_a_gradient(operator: Any, args: tuple[Any, ...]) -> None:
    """It runs on tensors that require gradients, and raises where one is asked for, also of what it writes into.

    Without gradients, what it writes into counts that, as autograd wants it, and nothing else does.
    """
    fresh = [value.clone() if isinstance(value, Tensor) else value for value in args]
    with torch.no_grad():
        operator(*fresh)
    written = places_written(operator.default)
    assert len(args) == len(operator.default._schema.arguments)
    for place, value in enumerate(fresh):
        if isinstance(value, Tensor):
            assert (value._version > 0) == (place in written), place
    given = [
        value.clone().requires_grad_(place not in written) if isinstance(value, Tensor) else value
        for place, value in enumerate(args)
    ]
    made = operator(*given)
    for out in (made[0] if isinstance(made, tuple) else made, *(given[place] for place in written)):
        with pytest.raises(NotImplementedError, match=f"{operator._qualified_op_name} has no gradient"):
            out.sum().backward()


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """A float64 leaf that wants a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()

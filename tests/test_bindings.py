"""What the native kernels take on trust is refused by their bindings, argument by argument, before C sees it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import pytest
import test_ops
import test_ssd_kernels
import torch
from kernel_inputs import spoiled
from torch import Tensor

from simba_compile.kernels.native import binding
from simba_compile.kernels.native import conv as native_conv
from simba_compile.kernels.native import linear as native_linear
from simba_compile.kernels.native import scan as native_scan
from simba_compile.kernels.native import tokens as native_tokens
from simba_compile.kernels.native.library import SOURCES
from simba_compile.kernels.ops import dispatch

pytestmark = pytest.mark.skipif(not binding.available(), reason="the native kernels were not built")

X, A, B, V = torch.randn(2, 5, 7), -torch.rand(7, 3), torch.randn(2, 5, 3), torch.randn(7)
ONE, NARROW, W = torch.randn(2, 7), torch.randn(2, 3), torch.randn(7, 4)
WIDE = B.repeat(1, 1, 99)
INDEX = torch.tensor([[0, 2, 4], [1, 2, 3]])
CALLS: dict[str, tuple[Any, ...]] = {
    "selective_scan": (X, X, A, B, B, V, X[:, :3], V, True, INDEX),
    "selective_scan_backward": (X, torch.randn(2, 7, 3), X, X, A, B, B, V, X, V, True),
    "influence": (X, X, A, B, B, V, True, "max", True),
    "causal_conv1d": (X, W, V, True),
    "causal_conv1d_backward": (X, X, W, V, True),
    "state_update": (torch.randn(2, 7, 3), ONE, ONE, A, NARROW, NARROW, V, ONE, V, True),
    "conv_update": (torch.randn(2, 7, 4), ONE, W, V, True),
    "rms_norm": (X, V, 1e-5),
    "gated_norm": (X, X, V, 1e-5, 1, None),
    "add_norm": (X, X[:, :3], V, 1e-5, INDEX),
    "gather": (X, INDEX),
    "select": (torch.randn(2, 5), 3, 1, 1),
}
PARAMETERS = {id(value) for value in (A, V, W)}  # are cast, from any type
STATES = {("state_update", 0), ("conv_update", 0), ("selective_scan_backward", 1), ("gated_norm", 1)}  # too
FINE = {  # what these take all the same
    *(("causal_conv1d", 0, "axis 0 too long"), ("causal_conv1d", 0, "axis 1 too long")),
    *(("causal_conv1d", 1, "axis 1 too long"), ("causal_conv1d_backward", 2, "axis 1 too long")),
    *(("selective_scan", 9, "axis 1 too long"), ("gather", 1, "axis 1 too long")),
    *(("gather", 0, "axis 1 too long"), ("gather", 0, "axis 2 too long"), ("gather", 0, "another rank")),
    *(("gather", 0, "whole numbers"), ("select", 0, "whole numbers"), ("rms_norm", 0, "another rank")),
    *(("select", 0, "axis 0 too long"), ("select", 0, "axis 1 too long")),
    *(("gated_norm", 0, "another rank"), ("add_norm", 0, "axis 1 too long")),
    *(("rms_norm", 0, "axis 0 too long"), ("rms_norm", 0, "axis 1 too long")),
}


CASES = [
    (name, place, what)
    for name, args in CALLS.items()
    for place, value in enumerate(args)
    if isinstance(value, Tensor)
    for what, _ in spoiled(value)
    if (name, place, what) not in FINE
    if what != "whole numbers" or not (id(value) in PARAMETERS or (name, place) in STATES)
]


def kernel_of(name: str) -> Callable:
    return getattr(dispatch._native_module(name), name)


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is not called."""

    def call(name: str, *_: Any) -> None:
        raise AssertionError(f"{name} was called")

    for kernels in dispatch.NATIVE:
        monkeypatch.setattr(kernels, "call", call)


@pytest.mark.parametrize(("name", "place", "what"), CASES)
def test_a_spoiled_argument_is_refused(name: str, place: int, what: str, unreached: None) -> None:
    args = list(CALLS[name])
    args[place] = dict(spoiled(args[place]))[what]
    with pytest.raises((ValueError, IndexError)):
        kernel_of(name)(*args)


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_that_are_spoiled_are_right(name: str) -> None:
    kernel_of(name)(*(value.clone() if isinstance(value, Tensor) else value for value in CALLS[name]))


NUMBERS: dict[str, Callable[[], Any]] = {
    "k beyond the tokens": lambda: native_tokens.select(torch.zeros(2, 5), 6, 0, 1),
    "k below the ends": lambda: native_tokens.select(torch.zeros(2, 5), 2, 2, 1),
    "negative ends": lambda: native_tokens.select(torch.zeros(2, 5), 3, -1, 1),
    "negative k": lambda: native_tokens.select(torch.zeros(2, 5), -1, 0, 0),
    "no such pool": lambda: native_scan.influence(X, X, A, B, B, V, True, "mean", True),
    "no states": lambda: native_scan.influence(X, X, A[:, :0], B[..., :0], B[..., :0], V, True, "max", True),
    "too many states": lambda: native_scan.influence(X, X, A.expand(7, 3).repeat(1, 99), *[WIDE] * 2, V, True, "max", True),
    "no width": lambda: native_conv.causal_conv1d(X, W[:, :0], V, True),
    "too wide": lambda: native_conv.causal_conv1d(X, W.repeat(1, 17), V, True),
    "scattered rows": lambda: native_tokens.gather(X.transpose(0, 2), INDEX.repeat(4, 1)[:7]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_out_of_range_is_refused(case: str, unreached: None) -> None:
    with pytest.raises(ValueError, match=r"expected|takes?|not in"):
        NUMBERS[case]()


@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**63)])
@pytest.mark.parametrize("name", ["selective_scan", "gather", "add_norm"])
def test_an_index_out_of_range_is_refused(name: str, bad: int) -> None:
    index = INDEX.clone()
    index[1, 1] = bad
    with pytest.raises(IndexError, match=r"outside 0\.\.4"):
        kernel_of(name)(*CALLS[name][:-1], index)


def test_structs_are_as_long_as_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field too few in Python, and C would read the next one in its place."""
    library = binding.library()
    called: set[str] = set()

    class Library:
        def __getattr__(self, name: str) -> Callable:
            def run(args: bytes, *rest: Any) -> int:
                kernel = name.removeprefix("simba_")
                called.add(kernel)
                assert len(args) == 8 * ctypes.c_int64.in_dll(library, f"simba_words_{kernel}").value, kernel
                return getattr(library, name)(args, *rest)

            return run

    monkeypatch.setattr(binding, "library", Library)
    for name, calls in (test_ops.samples() | test_ssd_kernels.samples()).items():
        for args in calls:
            (native_linear.linear if name == "linear" else getattr(torch.ops.simba, name))(*args)
    sources = "".join(file.read_text() for file in SOURCES.glob("*.c"))
    assert called == set(re.findall(r"^(?:EXPORT|WORDS)\((\w+), ", sources, re.MULTILINE))

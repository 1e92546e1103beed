"""Starting kernels: a launch like one before starts what Triton itself would; nothing runs, for there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from launches import NoDriver
from test_triton_targets import CASES
from triton_targets import OPTIONS, record

from simba_compile.kernels import gpu
from simba_compile.kernels.gpu import runtime


@triton.jit(do_not_specialize=runtime.LENGTHS)
def _add(x, y, step, tokens, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """Something of every kind of parameter."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * step, mask=i < tokens, other=0).to(tl.float32) * scale
    if y is not None:
        value += tl.load(y + i, mask=i < tokens, other=0).to(tl.float32)
    tl.store(x + i * step, (value * 2 if TWICE else value).to(x.dtype.element_ty), mask=i < tokens)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoDriver]:
    """Kernels are compiled for an H100, and started by this."""
    monkeypatch.setattr(runtime, "COMPILED", {})
    _add.device_caches.clear()  # what is in it goes to the driver that it was compiled by
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoDriver())
    yield triton.runtime.driver.active
    triton.runtime.driver._active = before


MEMORY = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
TENSORS = [memory[first:] for memory in MEMORY.values() for first in (0, 1)]
NUMBERS = [1, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16]
CHOICES = {
    "x": TENSORS, "y": [None, *TENSORS], "step": NUMBERS, "tokens": NUMBERS, "scale": [0.5, 2.0],
    "BLOCK": [32, 64], "TWICE": [False, True], "num_warps": [1, 4],
}  # fmt: skip


@pytest.mark.parametrize("usual", [0, -1])
@pytest.mark.parametrize("varied", CHOICES)
def test_a_launch_starts_what_triton_would(driver: NoDriver, varied: str, usual: int) -> None:
    """Whatever was started before: the compiled kernel that Triton finds by its own rules, on these arguments."""
    for value in CHOICES[varied]:
        call = {name: choices[usual] for name, choices in CHOICES.items()} | {varied: value}
        constants = {name: call.pop(name) for name in ("BLOCK", "TWICE", "num_warps")}
        _add[(3,)](**call, **constants, enable_fp_fusion=True)
        for _ in range(2):
            runtime.launch(_add, (3,), *call.values(), **constants)
        theirs, first, second = driver.started[-3:]
        assert first == second == theirs
        assert theirs[1:] == (3, *call.values(), constants["BLOCK"], constants["TWICE"])


def test_a_launch_is_looked_up_once(driver: NoDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one of its kind does not ask Triton again."""
    runtime.launch(_add, (3,), MEMORY[torch.float32], None, 1, 5, 0.5, BLOCK=32, TWICE=False, num_warps=1)
    monkeypatch.setattr(type(_add), "run", None)
    runtime.launch(_add, (9,), MEMORY[torch.float32], None, 1, 7, 0.5, BLOCK=32, TWICE=False, num_warps=1)
    assert [started[1] for started in driver.started] == [3, 9]


def test_constants_come_last() -> None:
    """As a launch passes them to what was compiled before."""
    for name, arguments in CASES.values():
        for launch in record(gpu.KERNELS[name], *arguments()):
            rest = launch.kernel.arg_names[len(launch.args) :]
            assert {*rest} == {*launch.constants} - {*OPTIONS}, launch.kernel.__name__


def test_launches_are_direct_outside_of_tracing() -> None:
    """Plain tensors start the kernel itself: no detour by a graph's node."""
    started = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return lambda *args, **constants: started.append((grid, args, constants))

    x = torch.zeros(3)
    runtime.launch(Kernel(), (7,), x, 5, BLOCK=2)
    assert started == [((7,), (x, 5), {"BLOCK": 2, "enable_fp_fusion": True})]

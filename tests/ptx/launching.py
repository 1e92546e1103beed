"""Operators' launchers on the simulator: what they start is compiled and runs here, on tensors of the CPU."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton_targets
from torch import Tensor

from ptx.memory import Fault, Memory
from ptx.parsing import Unknown, parse
from ptx.running import Launch, Order
from ptx.steps import Program
from ptx.values import Lanes
from simba_compile.kernels.gpu import runtime

BASE = 1 << 34  # an address of a tensor takes more than 32 bits
APART = 512  # at least so many bytes between two tensors belong to none
UNSET = 0xFF  # each byte of new memory: not a number of any type of floats, and a negative integer


class Simulator:
    """Compiles and runs launches.

    Parameters
    ----------
    target : str
        Of `triton_targets.TARGETS`, one of NVIDIA's.
    order : {"forward", "backward", "random"}
        In which order the warps of a block come, and the blocks of a launch.
    seed : int
        Of a random order.
    """

    def __init__(self, target: str = "sm_80", order: Order = "forward", seed: int = 0) -> None:
        self.target, self.order, self.random = target, order, random.Random(seed)
        # Storages that new_empty made, held so that none comes to lie where another was, and which of their bytes are set.
        self.new: dict[int, tuple[torch.UntypedStorage, Lanes]] = {}

    def made(self, tensor: Tensor) -> Tensor:
        """Take note that nothing is in this tensor."""
        raw = _bytes_of(tensor)
        raw[:] = UNSET
        if len(raw):
            self.new[tensor.data_ptr()] = tensor.untyped_storage(), np.zeros(len(raw), np.bool_)
        return tensor

    def launch(self, kernel: Callable[..., Any], grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Do what `runtime.launch` does."""
        if len(grid) != 1:
            raise Unknown(f"a grid of {len(grid)} axes")
        launch = triton_targets.Launch(kernel, grid, args, constants)
        compiled = triton_targets.compile_for(self.target, launch)
        program = _program(compiled.ptx)
        storages = {value.untyped_storage().data_ptr(): _bytes_of(value) for value in args if isinstance(value, Tensor)}
        memory, spans = self._memory(storages)

        def passed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            span = spans[value.untyped_storage().data_ptr()]
            return BASE + span.start + value.storage_offset() * value.element_size()

        signature = launch.source()[0].signature
        values = [passed(value) for name, value in zip(signature, args, strict=False) if signature[name] != "constexpr"]
        values += [0, 0]  # what Triton itself passes: two pieces of memory that no kernel of ours asks for
        declared = program.kernel.parameters
        parameters = {name: _parameter(value, kind) for (name, kind), value in zip(declared, values, strict=True)}
        started = Launch(memory, parameters, grid[0], compiled.warps, compiled.shared, self.order, self.random)
        try:
            started.run(program)
        except (Fault, Unknown) as error:
            raise type(error)(f"{compiled.name}, {error}") from error
        for pointer, raw in storages.items():
            raw[:] = memory.bytes[spans[pointer]]
            if pointer in self.new:
                self.new[pointer][1][:] = memory.set[spans[pointer]]

    def _memory(self, storages: dict[int, Lanes]) -> tuple[Memory, dict[int, slice]]:
        """A memory with copies of these storages, and where in it each is."""
        spans, end = {}, APART
        for pointer, raw in storages.items():
            spans[pointer] = slice(end, end + len(raw))
            end += (len(raw) // APART + 2) * APART
        memory = Memory("the tensors", end, BASE, exclusive=True)
        memory.usable[:] = False
        for pointer, raw in storages.items():
            span = spans[pointer]
            memory.bytes[span], memory.usable[span] = raw, True
            memory.set[span] = self.new[pointer][1] | _written(raw) if pointer in self.new else True
        return memory, spans


def _bytes_of(tensor: Tensor) -> Lanes:
    """All bytes of its storage, to be read and written."""
    raw: Lanes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return raw


def _written(raw: Lanes) -> Lanes:
    """Which bytes of new memory torch has written: of those words that are no longer as they were made."""
    words = np.pad(raw, (0, -len(raw) % 4), constant_values=UNSET).reshape(-1, 4)
    touched: Lanes = (words != UNSET).any(1)
    return touched.repeat(4)[: len(raw)]


def _parameter(value: float | bool, kind: str) -> Lanes:
    """The bytes of a kernel's argument."""
    width = int(kind[1:]) // 8
    if isinstance(value, float):
        return np.array([value], f"f{width}").view(np.uint8)
    return np.frombuffer((value & ((1 << 8 * width) - 1)).to_bytes(width, "little"), np.uint8)


@functools.cache
def _program(ptx: str) -> Program:
    return Program(parse(ptx))


@contextlib.contextmanager
def simulated(target: str = "sm_80", order: Order = "forward", seed: int = 0) -> Iterator[Simulator]:
    """Within, launchers of `simba_compile.kernels.gpu` take tensors of the CPU. What is wrong raises a `Fault`."""
    simulator = Simulator(target, order, seed)
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "launch", simulator.launch)
        patch.setattr(Tensor, "new_empty", lambda *args, **kwargs: simulator.made(new_empty(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: simulator.made(empty_like(*args, **kwargs)))
        yield simulator

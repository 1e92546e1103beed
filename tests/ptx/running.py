"""The warps and blocks of a launch, running."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ptx.memory import STAMPS, Access, Fault, Memory
from ptx.parsing import Instruction, Unknown
from ptx.steps import ALL_LANES, Mask, Program, Step
from ptx.values import LANES, Lanes
from ptx.warpgroups import Group

Order: TypeAlias = Literal["forward", "backward", "random"]
ORDERS: tuple[Order, ...] = ("forward", "backward", "random")
ENDED = 1 << 62  # where a lane is that has returned


class Registers(dict[str, Lanes]):
    """What is in each, but for those that belong to a product under way."""

    def __missing__(self, name: str) -> Lanes:
        """Refuse it."""
        raise Fault(f"{name} belongs to a product under way")


class Warp:
    """Thirty-two lanes.

    Those that are at the same instruction do it together. Where they have gone different ways, those that are behind go
    first, and wait before an exchange between lanes until all have come.
    """

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number = block, number
        self.registers = Registers(block.program.unset)  # arrays that are never changed in place
        self.at = 0
        self.apart: Mask = None  # where each lane is, while they are apart
        self.copies: list[list[tuple[Lanes, Lanes]]] = [[]]  # groups of asynchronous ones: addresses and bytes
        self.products, self.started = [Group()], 0  # of a group of warps; how many of them
        self.fenced: dict[str, Lanes] = {}  # registers, at the last wgmma.fence

    @property
    def access(self) -> Access:
        """Of memory, by this warp, now."""
        return Access(self.block.moment + self.number, self.block.moment, self.block.began)

    def set(self, register: str, value: Lanes, lanes: Mask) -> None:
        """Write to a register; what is narrower is extended."""
        if register == "_":
            return
        before = self.registers[register]
        if value.itemsize > before.itemsize:
            raise Unknown(f"{value.dtype} into {register}")
        if value.itemsize < before.itemsize:
            value = value.astype(f"i{before.itemsize}" if value.dtype.kind == "i" else before.dtype)
        value = value.view(before.dtype)
        self.registers[register] = value if lanes is None else np.where(lanes, value, before)

    def run(self) -> bool:
        """Run on to the next barrier; whether there was one."""
        while (lanes := self._next()) is None or lanes.any():
            step = self.block.program.steps[self.at]
            try:
                self._do(step, lanes)
            except (Fault, Unknown) as error:
                raise type(error)(f"warp {self.number}, {step.instruction.text}: {error}") from error
            if step.kind == "bar":
                return True
        return False

    def _do(self, step: Step, lanes: Mask) -> None:
        """Do what these lanes have come to, and move them on."""
        if step.together and lanes is not None:
            raise Fault("lanes have gone different ways")
        if step.kind == "ret":
            self._go(lanes, None, ENDED)
            return
        doing = self._doing(step.instruction, lanes)
        if step.kind == "bra":
            self._go(lanes, doing, step.target)
            return
        if doing is None or doing.any():
            if step.together and doing is not None:
                raise Fault("some lanes take no part")
            step.run(self, doing)
        self._go(lanes, None, self.at + 1)

    def _next(self) -> Mask:
        """Which lanes come next, at `self.at`; none of them when all have ended."""
        if self.apart is None:
            return None if self.at != ENDED else ~ALL_LANES
        going: Lanes = self.apart != ENDED
        free = going & ~self.block.program.together[np.where(going, self.apart, 0)]
        if not going.any():
            return going
        self.at = int(self.apart[free if free.any() else going].min())
        lanes: Lanes = self.apart == self.at
        if lanes.all():
            self.apart = None
            return None
        return lanes

    def _doing(self, instruction: Instruction, lanes: Mask) -> Mask:
        """Those of the lanes whose guard is true."""
        if not instruction.guard:
            return lanes
        guard = self.registers[instruction.guard]
        chosen: Lanes = ~guard if instruction.negated else guard
        if lanes is not None:
            chosen = chosen & lanes
        return None if chosen.all() else chosen

    def _go(self, lanes: Mask, jumping: Mask, target: int) -> None:
        """Move these lanes on: those that jump to the target, the others to the next instruction."""
        if lanes is None and (jumping is None or not jumping.any()):
            self.at = target if jumping is None else self.at + 1
            return
        places = np.full(LANES, self.at) if self.apart is None else self.apart
        moved = np.where(ALL_LANES if jumping is None else jumping, target, self.at + 1)
        self.apart = moved if lanes is None else np.where(lanes, moved, places)


class Block:
    """One block of a launch, with its shared memory."""

    def __init__(self, program: Program, launch: Launch, number: int, began: int) -> None:
        self.program, self.launch, self.number, self.began = program, launch, number, began
        self.moment = began
        self.shared = Memory("shared memory", launch.shared, warps=launch.warps)
        self.spaces = {"global": launch.tensors, "shared": self.shared}
        self.started: dict[tuple[int, int], tuple[object, ...]] = {}  # products, by group of warps and in order
        self.warps = [Warp(self, warp) for warp in range(launch.warps)]

    def run(self) -> int:
        """Run to the end; the stamp that is free then."""
        going = self.warps
        while going:
            waiting = [warp for warp in self.launch.ordered(going) if warp.run()]
            if waiting and len(waiting) < len(going):
                raise Fault("some warps have ended, others wait for them at a barrier")
            going = sorted(waiting, key=lambda warp: warp.number)
            self.moment += STAMPS
            self.shared.meet()
        return self.moment


@dataclass
class Launch:
    """What a kernel is started with.

    Parameters
    ----------
    tensors : Memory
        Where all tensors are.
    parameters : dict of str to ndarray
        The bytes of each.
    blocks, warps, shared : int
        How many there are; of bytes of shared memory.
    order : str
        In which warps and blocks come.
    random : Random
        What a random order is drawn from.
    """

    tensors: Memory
    parameters: dict[str, Lanes]
    blocks: int
    warps: int
    shared: int
    order: Order
    random: random.Random

    def ordered(self, items: list[Any]) -> list[Any]:
        """Warps or blocks, in the order in which they run."""
        if self.order == "random":
            return self.random.sample(items, len(items))
        return items if self.order == "forward" else items[::-1]

    def run(self, program: Program) -> None:
        """Run all blocks, one after another."""
        stamp = 0
        with np.errstate(all="ignore"):
            for number in self.ordered(list(range(self.blocks))):
                try:
                    stamp = Block(program, self, number, stamp).run()
                except (Fault, Unknown) as error:
                    raise type(error)(f"block {number}: {error}") from error

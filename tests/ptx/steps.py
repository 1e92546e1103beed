"""Instructions bound to the registers, the memory and the exchanges of a warp that does them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ptx import warpgroups
from ptx.parsing import Instruction, Kernel, Unknown
from ptx.values import LANE, LANES, TYPES, WHOLE_WARP, Lanes, Operation, bits, operation

if TYPE_CHECKING:
    from ptx.running import Warp

Mask: TypeAlias = Lanes | None  # which lanes; None is all of them
Read: TypeAlias = "Callable[[Warp], Lanes]"
Bound: TypeAlias = "Callable[[Warp, Mask], None]"
Operands: TypeAlias = tuple[tuple[str, ...], ...]
GARBAGE = 0xDEADBEEFDEADBEEF  # what is in registers that nobody has set
ALL_LANES = np.ones(LANES, np.bool_)


@dataclass(frozen=True)
class Step:
    """An instruction that is ready to run.

    Parameters
    ----------
    instruction : Instruction
    kind : str
        "bra", "ret" and "bar" are up to the warp; all others are "run".
    run : callable
        Has a warp do it in these lanes.
    target : int
        Where a branch goes.
    together : bool
        All lanes have to come here before one goes on.
    """

    instruction: Instruction
    kind: str
    run: Bound
    target: int = 0
    together: bool = False


class Program:
    """A kernel's steps."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps: list[Step] = []
        unknown: dict[str, str] = {}
        for instruction in kernel.code:
            try:
                self.steps.append(self._step(instruction))
            except Unknown as error:
                unknown.setdefault(instruction.opcode, f"{instruction.opcode} ({error})")
        if unknown:
            raise Unknown("; ".join(unknown.values()))
        self.together = np.array([step.together for step in self.steps])
        kinds = {kind: _raw(GARBAGE, bits(kind)).repeat(LANES) for kind in TYPES} | {"pred": ALL_LANES}
        self.unset = {name: kinds[kind] for name, kind in kernel.registers.items()}

    def _step(self, instruction: Instruction) -> Step:
        opcode, operands = instruction.opcode, instruction.operands
        for name in (name for operand in operands for name in operand if name[0] == "%"):
            if name not in self.kernel.registers and name not in SPECIAL:
                raise Unknown(f"no such register: {name}")
        if opcode in ("bra", "bra.uni"):
            return Step(instruction, "bra", _nothing, self.kernel.labels[operands[0][0]])
        if opcode == "ret" and not instruction.guard:
            return Step(instruction, "ret", _nothing)
        if opcode == "bar.sync" and operands == (("0",),) and not instruction.guard:
            return Step(instruction, "bar", _nothing, together=True)
        if opcode == "bar.warp.sync" and int(operands[0][0], 0) & WHOLE_WARP == WHOLE_WARP:
            return Step(instruction, "run", _nothing, together=True)
        if meaning := operation(instruction):
            return Step(instruction, "run", self._computed(meaning, operands), together=meaning.together)
        for pattern, bind, together in ACCESSES:
            if found := re.fullmatch(pattern, opcode):
                return Step(instruction, "run", bind(self, operands, *found.groups()), together=together)
        raise Unknown("no such instruction")

    def _computed(self, meaning: Operation, operands: Operands) -> Bound:
        results, sources = operands[0], [name for operand in operands[1:] for name in operand]
        if len(sources) != len(meaning.takes) or len(results) != len(meaning.gives):
            raise Unknown(f"{len(results)} results of {len(sources)} operands")
        reads = [self.read(name, kind) for name, kind in zip(sources, meaning.takes, strict=True)]
        if len(results) == 1:
            result = results[0]
            return lambda warp, lanes: warp.set(result, meaning.compute(*(read(warp) for read in reads)), lanes)

        def run(warp: Warp, lanes: Mask) -> None:
            for result, value in zip(results, meaning.compute(*(read(warp) for read in reads)), strict=True):
                warp.set(result, value, lanes)

        return run

    def read(self, operand: str, kind: str) -> Read:
        """What reads an operand as numbers of this type."""
        dtype: Any = np.dtype(TYPES[kind])
        if operand in SPECIAL:
            return lambda warp: SPECIAL[operand](warp).astype(dtype)
        if operand in self.kernel.registers:
            missing = bits(kind) - bits(self.kernel.registers[operand])
            if missing > 0:
                raise Unknown(f"{operand} read as {kind}")
            low = np.dtype(f"u{dtype.itemsize}")
            return lambda warp: (warp.registers[operand].astype(low) if missing else warp.registers[operand]).view(dtype)
        if operand == "global_smem":  # Triton's name of all of a block's shared memory
            constant = np.zeros(1, dtype)
        elif operand[:2] in ("0f", "0d"):
            raw = np.array([int(operand[2:], 16)], np.uint32 if operand[1] == "f" else np.uint64)
            constant = raw.view(dtype)
        elif re.fullmatch(r"-?\d+U?|0x[0-9a-fA-F]+U?", operand):
            number = int(operand.removesuffix("U"), 0)
            constant = np.array([number != 0]) if kind == "pred" else _raw(number, bits(kind)).view(dtype)
        else:
            raise Unknown(f"no such operand: {operand}")
        repeated = np.repeat(constant, LANES)
        return lambda warp: repeated

    def address(self, operand: str) -> Read:
        """What gives the addresses of an operand in brackets."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise Unknown(f"no such address: {operand}")
        base, offset = found[1], int(found[2] or 0)
        read = self.read(base, "s64" if self.kernel.registers.get(base) == "b64" else "u32")
        return lambda warp: read(warp).astype(np.int64) + offset


def _thread(warp: Warp) -> Lanes:
    return warp.number * LANES + LANE


def _block(warp: Warp) -> Lanes:
    return np.full(LANES, warp.block.number)


SPECIAL: dict[str, Read] = {"%tid.x": _thread, "%ctaid.x": _block}


def _nothing(warp: Warp, lanes: Mask) -> None:
    pass


def _raw(number: int, width: int) -> Lanes:
    """The bits of one integer."""
    return np.array([number & ((1 << width) - 1)], f"u{width // 8}")


# --- memory ----------------------------------------------------------------------------------------------------------


def _parameter(program: Program, operands: Operands, kind: str) -> Bound:
    (result,), (place,) = operands
    name, size = place.strip("[] "), bits(kind) // 8
    if name not in dict(program.kernel.parameters):
        raise Unknown(f"no such parameter: {name}")

    def run(warp: Warp, lanes: Mask) -> None:
        warp.set(result, np.repeat(warp.block.launch.parameters[name][:size].view(TYPES[kind]), LANES), lanes)

    return run


def _load(program: Program, operands: Operands, space: str, vector: str | None, kind: str) -> Bound:
    results, address = operands[0], program.address(operands[1][0])
    _check_vector(results, vector)

    def run(warp: Warp, lanes: Mask) -> None:
        chosen = ALL_LANES if lanes is None else lanes
        found = np.zeros((LANES, len(results) * bits(kind) // 8), np.uint8)
        found[chosen] = warp.block.spaces[space].read(address(warp)[chosen], found.shape[1], warp.access)
        numbers = found.view(TYPES[kind])
        for place, result in enumerate(results):
            warp.set(result, np.ascontiguousarray(numbers[:, place]), lanes)

    return run


def _store(program: Program, operands: Operands, space: str, vector: str | None, kind: str) -> Bound:
    address, reads = program.address(operands[0][0]), [program.read(name, kind) for name in operands[1]]
    _check_vector(operands[1], vector)

    def run(warp: Warp, lanes: Mask) -> None:
        chosen = ALL_LANES if lanes is None else lanes
        values = np.stack([read(warp) for read in reads], 1).view(np.uint8)
        warp.block.spaces[space].write(address(warp)[chosen], values[chosen], warp.access)

    return run


def _check_vector(registers: tuple[str, ...], vector: str | None) -> None:
    if len(registers) != int(vector or 1):
        raise Unknown(f"{len(registers)} registers of a vector of {vector}")


def _matrices(program: Program, operands: Operands, direction: str, count: str, transposed: str | None) -> Bound:
    """8 × 8 halves each: a lane has an address of a row, and in its register for a matrix two neighbours in a row."""
    store = direction == "st"
    registers, (place,) = operands[::-1] if store else operands
    address = program.address(place)
    _check_vector(registers, count)
    reads = [program.read(name, "b32") for name in registers] if store else []

    def turned(matrices: Lanes) -> Lanes:
        halves = np.ascontiguousarray(matrices).view(np.uint16).reshape(-1, 8, 8)
        return np.ascontiguousarray(halves.transpose(0, 2, 1) if transposed else halves)

    def run(warp: Warp, lanes: Mask) -> None:
        shared, rows = warp.block.spaces["shared"], address(warp)[: 8 * len(registers)]
        if store:
            values = turned(np.stack([read(warp) for read in reads]))
            shared.write(rows, values.reshape(-1, 8).view(np.uint8), warp.access)
            return
        values = turned(shared.read(rows, 16, warp.access)).reshape(-1, 64).view(np.uint32)
        for register, value in zip(registers, values, strict=True):
            warp.set(register, value, lanes)

    return run


def _add(program: Program, operands: Operands) -> Bound:
    """Atomic: lane by lane."""
    (result,), (place,), (number,) = operands
    address, read = program.address(place), program.read(number, "u32")

    def run(warp: Warp, lanes: Mask) -> None:
        shared, access = warp.block.spaces["shared"], warp.access.as_atomic()
        places, added, before = address(warp), read(warp), np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(ALL_LANES if lanes is None else lanes):
            at = places[lane : lane + 1]
            old = shared.read(at, 4, access).view(np.uint32)[:, 0]
            shared.write(at, (old + added[lane]).astype(np.uint32)[:, None].view(np.uint8), access)
            before[lane] = old[0]
        warp.set(result, before, lanes)

    return run


def _copy(program: Program, operands: Operands) -> Bound:
    """From a tensor to shared memory: it may come at any time until it is waited for, so that nobody may look before."""
    target, source = (program.address(place) for (place,) in operands[:2])
    size = int(operands[2][0], 0)
    taken = program.read(operands[3][0], "u32") if len(operands) == 4 else None

    def run(warp: Warp, lanes: Mask) -> None:
        chosen = ALL_LANES if lanes is None else lanes
        found = np.zeros((LANES, size), np.uint8)
        wanted = np.full(LANES, size) if taken is None else taken(warp)
        if not np.isin(wanted[chosen], (0, size)).all():
            raise Unknown("a copy of a part")
        full = chosen & (wanted == size)  # the others get zeros
        found[full] = warp.block.spaces["global"].read(source(warp)[full], size, warp.access)
        places = target(warp)[chosen]
        warp.block.spaces["shared"].claim(places, found[chosen], warp.access)
        warp.copies[-1].append((places, found[chosen]))

    return run


def _end_of_group(program: Program, operands: Operands) -> Bound:
    return lambda warp, lanes: warp.copies.append([])


def _wait_for_groups(program: Program, operands: Operands) -> Bound:
    under_way = int(operands[0][0], 0) + 1  # with the one that has not ended

    def run(warp: Warp, lanes: Mask) -> None:
        while len(warp.copies) > under_way:
            for places, values in warp.copies.pop(0):
                warp.block.spaces["shared"].write(places, values, warp.access)

    return run


# Patterns of opcodes, what binds them, and whether all lanes have to be there.
ACCESSES: tuple[tuple[str, Callable[..., Bound], bool], ...] = (
    (r"ld\.param\.([bus](?:32|64)|f32|f64)", _parameter, False),
    (r"ld\.(global|shared)(?:::cta)?(?:\.v([24]))?\.([bus](?:8|16|32|64))", _load, False),
    (r"st\.(global|shared)(?:::cta)?(?:\.v([24]))?\.([bus](?:8|16|32|64))", _store, False),
    (r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", _matrices, True),
    (r"atom(?:\.relaxed\.\w+)?\.shared(?:::cta)?\.add\.u32", _add, False),
    (r"cp\.async\.c[ag]\.shared\.global", _copy, False),
    (r"cp\.async\.commit_group", _end_of_group, True),
    (r"cp\.async\.wait_group", _wait_for_groups, True),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", warpgroups.product, True),
    (r"wgmma\.fence\.sync\.aligned", warpgroups.fence_registers, True),
    (r"wgmma\.commit_group\.sync\.aligned", warpgroups.end_of_group, True),
    (r"wgmma\.wait_group\.sync\.aligned", warpgroups.wait_for_groups, True),
    (r"fence\.proxy\.async\.shared::cta", warpgroups.fence_proxy, True),
)

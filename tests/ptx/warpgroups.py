"""Products of matrices that four warps start together and that go on beside them (wgmma, sm_90).

A product reads matrices in shared memory through another proxy than loads and stores: what these wrote it sees only behind a
fence. From its start until it is waited for, nobody may write there, and the registers that it has belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ptx.memory import Fault
from ptx.parsing import Unknown
from ptx.values import Lanes, dealt, fragments, from_halves

if TYPE_CHECKING:
    from ptx.running import Warp
    from ptx.steps import Bound, Mask, Operands, Program

WARPS, ROWS, DEPTH = 4, 64, 16  # of a group; of the left matrix, of which each warp has a quarter; of both
SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # bits 62 and 63 of a descriptor: how many bits of addresses are swapped


@dataclass
class Group:
    """What a warp started until it ended a group.

    Parameters
    ----------
    registers : dict of str to ndarray
        Those which the products have, with what is in them at the end.
    read : list of ndarray
        Where in shared memory they read.
    """

    registers: dict[str, Lanes] = field(default_factory=dict)
    read: list[Lanes] = field(default_factory=list)


def product(program: Program, operands: Operands, columns: str, kind: str) -> Bound:
    """D = A · B + D, of 64 × 16 and 16 × `columns` halves, or A · B where a predicate is false.

    A is in shared memory, or in registers as for a product of one warp (mma), and so are D's quarters.
    """
    results, left, (right,), (added,), *numbers = operands
    in_registers = len(left) > 1
    if [number for (number,) in numbers[:2]] != ["1", "1"] or len(numbers) != (3 if in_registers else 4):
        raise Unknown("a product with a sign")
    if len(left) not in (1, 4) or len(results) != int(columns) // 2:
        raise Unknown(f"{len(results)} results of {len(left)} registers")
    turned = [number != ("0",) for number in numbers[2:]]
    descriptors = [program.read(name, "b64") for name in ((right,) if in_registers else (*left, right))]
    add = program.read(added, "pred")

    def run(warp: Warp, lanes: Mask) -> None:
        sizes = (int(columns),) if in_registers else (ROWS, int(columns))
        given = [_of_all_lanes(read(warp)) for read in descriptors]
        _check_warps(warp, (columns, kind, *given))
        group = warp.products[-1]
        matrices = []
        for descriptor, rows, along_rows in zip(given, sizes, turned, strict=True):
            at = places(descriptor, rows, along_rows)
            found, read = warp.block.shared.begin_to_read(at.ravel(), 2, warp.number, warp.access)
            group.read.append(read)
            matrices.append(from_halves(found.view(np.uint16).reshape(at.shape), kind))
        if in_registers:
            matrices.insert(0, fragments([_take(warp, name) for name in left], kind))
        else:
            matrices[0] = matrices[0].reshape(WARPS, ROWS // WARPS, DEPTH)[warp.number % WARPS]
        adding = _of_all_lanes(add(warp))
        for name, part in zip(results, dealt(matrices[0] @ matrices[1].T), strict=True):
            before = _take(warp, name).view(np.float32)
            group.registers[name] = (part + (before if adding else 0)).astype(np.float32).view(np.uint32)

    return run


def places(descriptor: int, rows: int, along_rows: bool) -> Lanes:
    """Addresses (rows, 16) of a matrix's halves (PTX ISA, "Matrix descriptor"; CUTLASS, mma_traits_sm90_gmma.hpp).

    Pieces of 8 rows of 16, 32, 64 or 128 bytes lie one behind another. A row of a piece goes along the depth, or else
    along the matrix's rows. The descriptor says where the first piece is and how far pieces are apart in both directions,
    and which bits of an address are swapped, so that rows come to lie in different banks.
    """
    start, lead, stride = (descriptor >> first << 4 & 0x3FFF0 for first in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unknown("a matrix with an offset to its base")
    swapped = SWIZZLES[descriptor >> 62]
    width = 16 << swapped  # of a row of a piece, in bytes
    row, depth = np.indices((rows, DEPTH))
    along, across = (2 * row, depth) if along_rows else (2 * depth, row)
    near, far = (stride, lead) if along_rows and not swapped else (lead, stride)
    address = start + along % width + along // width * near + across % 8 * width + across // 8 * far
    return address ^ (address >> 3 & ((1 << swapped) - 1) << 4)


def fence_registers(program: Program, operands: Operands) -> Bound:
    """What is in registers now, products may have."""

    def run(warp: Warp, lanes: Mask) -> None:
        warp.fenced = dict(warp.registers)

    return run


def fence_proxy(program: Program, operands: Operands) -> Bound:
    """What this warp knows to be written, products may read."""
    return lambda warp, lanes: warp.block.shared.fence(warp.number, warp.access)


def end_of_group(program: Program, operands: Operands) -> Bound:
    """Products from here on are another group."""
    return lambda warp, lanes: warp.products.append(Group())


def wait_for_groups(program: Program, operands: Operands) -> Bound:
    """Those but the last so many are done then."""
    under_way = int(operands[0][0], 0) + 1  # with the one that has not ended

    def run(warp: Warp, lanes: Mask) -> None:
        done, warp.products = warp.products[:-under_way], warp.products[-under_way:]
        for group in done:
            for at in group.read:
                warp.block.shared.has_read(at, warp.access)
            later = {name for other in warp.products for name in other.registers}
            given = {name: value for name, value in group.registers.items() if name not in later}
            warp.registers |= given
            warp.fenced |= given

    return run


def _take(warp: Warp, name: str) -> Lanes:
    """What is in a register, which belongs to a product from now on."""
    for group in reversed(warp.products):
        if name in group.registers:
            return group.registers[name]
    value = warp.registers[name]
    if warp.fenced.get(name) is not value:
        raise Fault(f"{name} was written, and no wgmma.fence came since")
    warp.products[-1].registers[name] = warp.registers.pop(name)
    return value


def _of_all_lanes(values: Lanes) -> int:
    if (values != values[0]).any():
        raise Fault("lanes give different matrices")
    return int(values[0])


def _check_warps(warp: Warp, given: tuple[object, ...]) -> None:
    """The warps of a group start the same products in the same order."""
    if len(warp.block.warps) % WARPS:
        raise Fault("a group of warps is not whole")
    warp.started += 1
    if warp.block.started.setdefault((warp.number // WARPS, warp.started), given) != given:
        raise Fault("the warps of a group give different matrices")

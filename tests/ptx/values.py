"""What an instruction computes from registers: the 32 lanes of a warp at once, each an entry of an array.

A rule is for opcodes that match its pattern whole, so that a modifier which no pattern has is refused, not overlooked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ptx.parsing import Instruction, Unknown

Lanes: TypeAlias = np.ndarray[Any, Any]
LANES = 32
LANE = np.arange(LANES)
# How the entries of an array are to be read. numpy has no bfloat16.
TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": np.uint16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
SMALLEST = np.finfo(np.float32).tiny
WHOLE_WARP = 0xFFFFFFFF


@dataclass(frozen=True)
class Operation:
    """What one instruction computes.

    Parameters
    ----------
    takes, gives : tuple of str
        The types of its inputs, and of its results, in the order of their registers.
    compute : callable
        From arrays of the inputs to one of the result, or to a sequence of them.
    together : bool
        It exchanges numbers between lanes: all have to be there.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    compute: Callable[..., Any]
    together: bool = False


Rule: TypeAlias = Callable[..., Operation]
_rules: list[tuple[re.Pattern[str], Rule]] = []


def _rule(pattern: str) -> Callable[[Rule], Rule]:
    """Have the function make the operation of such opcodes; it gets the pattern's named groups."""

    def register(make: Rule) -> Rule:
        _rules.append((re.compile(pattern), make))
        return make

    return register


def operation(instruction: Instruction) -> Operation | None:
    """What an instruction computes; None if it is not one that computes."""
    for pattern, make in _rules:
        if found := pattern.fullmatch(instruction.opcode):
            given: dict[str, Any] = found.groupdict()
            if make is _mov:
                given |= {"results": len(instruction.operands[0]), "sources": len(instruction.operands[1])}
            if make is _extreme:
                given |= {"sources": len(instruction.operands) - 1}
            return make(**given)
    return None


def bits(kind: str) -> int:
    """How wide a type is."""
    return 8 * int(np.dtype(TYPES[kind]).itemsize)


# --- moves and bits --------------------------------------------------------------------------------------------------


@_rule(r"mov\.(?P<kind>pred|[bus](?:16|32|64)|f32|f64)")
def _mov(kind: str, results: int, sources: int) -> Operation:
    """One register to another, or one to its parts, the lowest bits first, or parts to one."""
    if results == sources == 1:
        return Operation((kind,), (kind,), lambda value: value)
    width = bits(kind) // max(results, sources)
    part, shifts = f"b{width}", [np.uint64(width * place) for place in range(max(results, sources))]
    if results > 1:
        return Operation((kind,), (part,) * results, lambda value: [_low(value >> shift, part) for shift in shifts])

    def join(*parts: Lanes) -> Lanes:
        return _low(sum(value.astype(np.uint64) << shift for value, shift in zip(parts, shifts, strict=True)), kind)

    return Operation((part,) * sources, (kind,), join)


def _low(value: Any, kind: str) -> Lanes:
    result: Lanes = value.astype(TYPES[kind])
    return result


@_rule(r"(?P<name>and|or|xor)\.(?P<kind>pred|b16|b32|b64)")
def _bitwise(name: str, kind: str) -> Operation:
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return Operation((kind, kind), (kind,), compute)


@_rule(r"not\.(?P<kind>pred|b16|b32|b64)")
def _not(kind: str) -> Operation:
    return Operation((kind,), (kind,), np.invert)


@_rule(r"(?P<name>shl\.b|shr\.u|shr\.s)(?P<width>16|32|64)")
def _shift(name: str, width: str) -> Operation:
    kind, most = name[-1] + width, int(width) - 1

    def compute(value: Lanes, by: Lanes) -> Lanes:
        shifted = (np.left_shift if name == "shl.b" else np.right_shift)(value, np.minimum(by, most).astype(value.dtype))
        return shifted if name == "shr.s" else np.where(by > most, 0, shifted).astype(value.dtype)

    return Operation((kind, "u32"), (kind,), compute)


@_rule(r"bfe\.(?P<kind>[us]32)")
def _bit_field(kind: str) -> Operation:
    def compute(value: Lanes, first: Lanes, length: Lanes) -> Lanes:
        wide, places = value.astype(np.int64), length.astype(np.int64)
        field = (wide >> first) & ((1 << places) - 1)
        sign = (wide >> np.minimum(first + places - 1, 31)) & 1 & (places > 0)
        return _low(field - (sign << places) if kind == "s32" else field, kind)

    return Operation((kind, "u32", "u32"), (kind,), compute)


@_rule(r"popc\.b32")
def _population() -> Operation:
    return Operation(("b32",), ("u32",), lambda value: _low(sum((value >> np.uint32(bit)) & 1 for bit in range(32)), "u32"))


@_rule(r"prmt\.b32")
def _permute() -> Operation:
    """Any four of the eight bytes of two numbers, by the digits of the last; with 8 added, a byte's sign in all bits."""

    def compute(low: Lanes, high: Lanes, digits: Lanes) -> Lanes:
        both = _low(low, "u64") | (_low(high, "u64") << 32)
        result = np.zeros(LANES, np.uint64)
        for place in range(4):
            digit = (digits >> (4 * place)) & 15
            byte = (both >> _low(8 * (digit & 7), "u64")) & 255
            result |= np.where(digit & 8, 255 * (byte >> 7), byte) << (8 * place)
        return _low(result, "b32")

    return Operation(("b32", "b32", "b32"), ("b32",), compute)


# --- integers --------------------------------------------------------------------------------------------------------


@_rule(r"(?P<name>add|sub|mul\.lo|min|max|div|rem)\.(?P<kind>[us](?:16|32|64))")
def _integers(name: str, kind: str) -> Operation:
    compute: dict[str, Callable[..., Any]] = {
        "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
        "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b,
    }  # fmt: skip
    return Operation((kind, kind), (kind,), compute[name])


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero; by zero, all bits (lanes whose result nobody uses do that)."""
    floor = np.floor_divide(a, np.where(b == 0, 1, b))
    exact = floor * b == a
    return np.where(b == 0, np.invert(b), floor + (~exact & ((a < 0) != (b < 0)))).astype(a.dtype)


@_rule(r"neg\.(?P<kind>s16|s32|s64)")
def _negative(kind: str) -> Operation:
    return Operation((kind,), (kind,), np.negative)


@_rule(r"mad\.lo\.(?P<kind>[us](?:16|32|64))")
def _multiply_add(kind: str) -> Operation:
    return Operation((kind,) * 3, (kind,), lambda a, b, c: a * b + c)


@_rule(r"(?P<name>mul|mad)\.wide\.(?P<sign>[us])(?P<width>16|32)")
def _wide(name: str, sign: str, width: str) -> Operation:
    kind, wide = sign + width, sign + str(2 * int(width))

    def compute(a: Lanes, b: Lanes, *c: Lanes) -> Lanes:
        return sum(c, start=_low(a, wide) * _low(b, wide))

    return Operation((kind, kind, wide) if name == "mad" else (kind, kind), (wide,), compute)


@_rule(r"mul\.hi\.(?P<kind>[us]32)")
def _high(kind: str) -> Operation:
    wide = kind[0] + "64"
    return Operation((kind, kind), (kind,), lambda a, b: _low((_low(a, wide) * _low(b, wide)) >> 32, kind))


# --- floating point --------------------------------------------------------------------------------------------------


def _flushed(compute: Callable[..., Lanes], ftz: str | None) -> Callable[..., Lanes]:
    """With subnormal inputs and results taken for zeros of their sign, if so told."""

    def flush(value: Lanes) -> Lanes:
        return np.where(np.abs(value) < SMALLEST, np.copysign(np.float32(0), value), value)

    return (lambda *inputs: flush(compute(*map(flush, inputs)))) if ftz else compute


@_rule(r"(?P<name>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<kind>f32|f64)")
def _floats(name: str, ftz: str | None, kind: str) -> Operation:
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    return Operation((kind, kind), (kind,), _flushed(compute, ftz))


@_rule(r"(?P<name>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<kind>f32|f64)")
def _extreme(name: str, ftz: str | None, nan: str | None, kind: str, sources: int) -> Operation:
    """Of a number and a NaN the number, or with .NaN the NaN; of two numbers or three."""
    either = (np.minimum, np.fmin) if name == "min" else (np.maximum, np.fmax)
    choose = either[0 if nan else 1]
    return Operation((kind,) * sources, (kind,), _flushed(lambda *numbers: functools.reduce(choose, numbers), ftz))


@_rule(r"fma\.rn(?P<ftz>\.ftz)?\.(?P<kind>f32|f64)")
def _fused(ftz: str | None, kind: str) -> Operation:
    """Rounded once but for rare cases: the product is exact in the wider type (for f64 nearly), the sum is rounded twice."""
    wide = np.float64 if kind == "f32" else np.longdouble
    compute = _flushed(lambda a, b, c: _low(a.astype(wide) * b.astype(wide) + c.astype(wide), kind), ftz)
    return Operation((kind,) * 3, (kind,), compute)


@_rule(r"(?P<name>add|sub|mul|fma\.rn)(?:\.rn)?\.f32x2")
def _two_at_once(name: str) -> Operation:
    """On both halves of registers of 64 bits."""
    one = _fused(None, "f32") if name == "fma.rn" else _floats(name, None, "f32")

    def compute(*pairs: Lanes) -> Lanes:
        return one.compute(*(pair.view(np.float32) for pair in pairs)).view(np.uint64)

    return Operation(("b64",) * len(one.takes), ("b64",), compute)


@_rule(r"(?P<name>add|sub|fma)\.rn\.f32\.(?P<kind>bf16|f16)")
def _mixed(name: str, kind: str) -> Operation:
    """The last operand is a float32, the others are halves."""
    one = _fused(None, "f32") if name == "fma" else _floats(name, None, "f32")

    def compute(*numbers: Lanes) -> Lanes:
        *halves, last = numbers
        result: Lanes = one.compute(*(_low(from_halves(half, kind), "f32") for half in halves), last)
        return result

    return Operation((kind,) * (len(one.takes) - 1) + ("f32",), ("f32",), compute)


@_rule(r"(?P<name>neg|abs)(?P<ftz>\.ftz)?\.(?P<kind>f32|f64)")
def _sign(name: str, ftz: str | None, kind: str) -> Operation:
    return Operation((kind,), (kind,), _flushed({"neg": np.negative, "abs": np.abs}[name], ftz))


@_rule(r"(?P<name>ex2|lg2|rsqrt|rcp|sqrt)\.approx(?P<ftz>\.ftz)?\.f32")
def _approximate(name: str, ftz: str | None) -> Operation:
    functions: dict[str, Callable[[Lanes], Lanes]] = {
        "ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x, "sqrt": np.sqrt,
    }  # fmt: skip
    return Operation(("f32",), ("f32",), _flushed(lambda x: _low(functions[name](x.astype(np.float64)), "f32"), ftz))


@_rule(r"div\.(?:full|rn)\.f32")
def _ratio() -> Operation:
    return Operation(("f32", "f32"), ("f32",), np.divide)


# --- comparisons and conversions -------------------------------------------------------------------------------------

COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


@_rule(r"setp\.(?P<name>eq|ne|lt|le|gt|ge)\.(?P<kind>[bus](?:16|32|64))")
def _compare(name: str, kind: str) -> Operation:
    return Operation((kind, kind), ("pred",), COMPARISONS.get(name, np.not_equal))


@_rule(r"setp\.(?P<name>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)\.(?P<kind>f32|f64)")
def _compare_floats(name: str, kind: str) -> Operation:
    """With a NaN only those with a u are true."""

    def compute(a: Lanes, b: Lanes) -> Lanes:
        missing = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return missing if name == "nan" else ~missing
        told = a != b if name.startswith("ne") else COMPARISONS[name[:2]](a, b)
        return told | missing if len(name) == 3 else told & ~missing

    return Operation((kind, kind), ("pred",), compute)


@_rule(r"selp\.(?P<kind>[bus](?:16|32|64)|f32|f64)")
def _select(kind: str) -> Operation:
    return Operation((kind, kind, "pred"), (kind,), lambda a, b, first: np.where(first, a, b))


@_rule(r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<kind>[us](?:8|16|32|64))")
@_rule(r"cvt\.rn\.(?P<to>f32|f64)\.(?P<kind>[us](?:32|64)|f64)")
@_rule(r"cvt\.(?P<to>f32|f64)\.(?P<kind>f16|f32|bf16)")
@_rule(r"cvt\.rn\.(?P<to>f16|bf16)\.(?P<kind>f32)")
def _convert(to: str, kind: str) -> Operation:
    def compute(value: Lanes) -> Lanes:
        number = _from_bfloat16(value) if kind == "bf16" else value
        return _to_bfloat16(number) if to == "bf16" else _low(number, to)

    return Operation((kind,), (to,), compute)


@_rule(r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32")
def _convert_two(to: str) -> Operation:
    def compute(high: Lanes, low: Lanes) -> Lanes:
        halves = (_to_bfloat16(x) if to == "bf16" else x.astype(np.float16).view(np.uint16) for x in (high, low))
        upper, lower = (half.astype(np.uint32) for half in halves)
        return (upper << 16) | lower

    return Operation(("f32", "f32"), ("b32",), compute)


@_rule(r"cvt\.rna\.tf32\.f32")
def _to_tf32() -> Operation:
    """Ten bits behind the point; halves away from zero."""
    infinity, kept = np.uint32(0x7F800000), np.uint32(0xFFFFE000)  # their bits
    return Operation(("b32",), ("b32",), lambda raw: np.where(raw & infinity == infinity, raw, (raw + 0x1000) & kept))


def _to_bfloat16(x: Lanes) -> Lanes:
    raw = x.view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # halves to even
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _from_bfloat16(raw: Lanes) -> Lanes:
    return (raw.astype(np.uint32) << 16).view(np.float32)


# --- between lanes ---------------------------------------------------------------------------------------------------


def _of_whole_warp(members: Lanes) -> None:
    if (members.view(np.uint32) != WHOLE_WARP).any():
        raise Unknown("an exchange between some lanes of a warp only")


@_rule(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def _shuffle(mode: str) -> Operation:
    """Each lane gets another's number, or keeps its own where that other is outside of its segment."""

    def compute(value: Lanes, by: Lanes, clamp: Lanes, members: Lanes) -> Lanes:
        _of_whole_warp(members)
        by, bound, segment = by & 31, clamp & 31, (clamp >> 8) & 31
        first, last = LANE & segment, (LANE & segment) | (bound & ~segment)
        sources = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by, "idx": first | (by & ~segment)}
        source = sources[mode]
        return value[np.where(source >= last if mode == "up" else source <= last, source, LANE)]

    return Operation(("b32", "s32", "s32", "b32"), ("b32",), compute, together=True)


@_rule(r"vote\.sync\.ballot\.b32")
def _ballot() -> Operation:
    def compute(value: Lanes, members: Lanes) -> Lanes:
        _of_whole_warp(members)
        return np.full(LANES, np.sum(value.astype(np.uint32) << LANE.astype(np.uint32)), np.uint32)

    return Operation(("pred", "b32"), ("b32",), compute, together=True)


@_rule(r"redux\.sync\.(?P<name>add|min|max)\.(?P<kind>[us]32)")
@_rule(r"redux\.sync\.(?P<name>min|max)\.NaN\.(?P<kind>f32)")
def _reduce(name: str, kind: str) -> Operation:
    def compute(value: Lanes, members: Lanes) -> Lanes:
        _of_whole_warp(members)
        reduce: Any = {"add": np.add, "min": np.minimum, "max": np.maximum}[name].reduce
        return np.full(LANES, reduce(value, dtype=value.dtype))

    return Operation((kind, "b32"), (kind,), compute, together=True)


@_rule(r"mma\.sync\.aligned\.m16n8k(?P<depth>8)\.row\.col\.f32\.(?P<kind>tf32)\.tf32\.f32")
@_rule(r"mma\.sync\.aligned\.m16n8k(?P<depth>8|16)\.row\.col\.f32\.(?P<kind>bf16)\.bf16\.f32")
@_rule(r"mma\.sync\.aligned\.m16n8k(?P<depth>8|16)\.row\.col\.f32\.(?P<kind>f16)\.f16\.f32")
def _product(depth: str, kind: str) -> Operation:
    """D = A · B + C of 16 × `depth`, `depth` × 8 and 16 × 8 numbers.

    Lane 4 r + c has of rows r and r + 8 of A, and of column r of B, numbers c and c + 4 (tf32), or pairs of numbers c and
    c + 4 (halves, two in a register); of C and D it has columns 2 c and 2 c + 1 in rows r and r + 8.
    """
    pieces = int(depth) // (4 if kind == "tf32" else 8)  # registers along the depth

    def compute(*registers: Lanes) -> list[Lanes]:
        a, b, c = registers[: 2 * pieces], registers[2 * pieces : 3 * pieces], registers[3 * pieces :]
        parts = dealt(fragments(a, kind) @ _along(b, kind).T)
        return [(part + number).astype(np.float32) for part, number in zip(parts, c, strict=True)]

    return Operation(("b32",) * 3 * pieces + ("f32",) * 4, ("f32",) * 4, compute, together=True)


def dealt(matrix: Lanes) -> list[Lanes]:
    """What each register has of a result of `_product`, or of several side by side: (16, columns)."""
    row, column = LANE // 4, LANE % 4
    eights = range(0, matrix.shape[1], 8)
    return [matrix[row + down, first + 2 * column + right] for first in eights for down in (0, 8) for right in (0, 1)]


def fragments(registers: Sequence[Lanes], kind: str) -> Lanes:
    """The left matrix of `_product`, (16, depth), of its registers."""
    return np.concatenate([_along(registers[0::2], kind), _along(registers[1::2], kind)])


def _along(registers: Sequence[Lanes], kind: str) -> Lanes:
    """Numbers (8, depth) of the registers of one row (or column) of lanes."""
    if kind == "tf32":
        numbers = [(raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64).reshape(8, 4) for raw in registers]
    else:
        numbers = [from_halves(raw.view(np.uint16).reshape(8, 8), kind) for raw in registers]
    return np.concatenate(numbers, 1)


def from_halves(raw: Lanes, kind: str) -> Lanes:
    """Bits of bf16 or f16 as numbers in float64."""
    numbers: Lanes = _from_bfloat16(raw) if kind == "bf16" else raw.view(np.float16)
    return numbers.astype(np.float64)

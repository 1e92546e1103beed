"""The text of a PTX kernel as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass


class Unknown(NotImplementedError):
    """Something in the text that the simulator does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Parameters
    ----------
    text : str
        As it was written.
    guard : str
        The predicate register that says which lanes do it; empty where all do.
    negated : bool
        Those do it whose guard is false.
    opcode : str
        With all modifiers.
    operands : tuple of tuple of str
        Each by its parts: those in braces, or it alone. An address keeps its brackets.
    """

    text: str
    guard: str
    negated: bool
    opcode: str
    operands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Kernel:
    """One entry.

    Parameters
    ----------
    parameters : tuple of (str, str)
        Name and type of each, in order.
    registers : dict of str to str
        The type of each.
    code : tuple of Instruction
        All of them, in order.
    labels : dict of str to int
        Which instruction stands behind a label.
    """

    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, str]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^{]*\{(?P<body>.*?)^\}", re.S | re.M)
PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)")
LABEL = re.compile(r"([\w$]+):(?!:)\s*")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<(\d+)>")
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
WITHOUT_MEANING = re.compile(r"//[^\n]*|^\s*\.loc\b[^\n]*|^\s*\.pragma\b[^\n]*", re.M)  # where it came from; unrolling


def parse(ptx: str) -> Kernel:
    """Read the only entry of a text."""
    entries = list(ENTRY.finditer(WITHOUT_MEANING.sub("", ptx)))
    if len(entries) != 1:
        raise Unknown(f"{len(entries)} entries in one text")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    for statement in entries[0]["body"].split(";"):
        statement = statement.strip()
        while label := LABEL.match(statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :]
        if declared := REGISTERS.fullmatch(statement):
            registers |= {f"{declared[2]}{number}": declared[1] for number in range(int(declared[3]))}
        elif statement:
            code.append(_instruction(statement))
    parameters = tuple((name, kind) for kind, name in PARAMETER.findall(entries[0]["parameters"]))
    return Kernel(parameters, registers, tuple(code), labels)


def _instruction(statement: str) -> Instruction:
    parts = STATEMENT.fullmatch(statement)
    if parts is None:
        raise Unknown(statement)
    negated, guard, opcode, rest = parts.groups()
    operands = tuple(tuple(re.findall(r"[^{},\s]+", text)) if text[0] == "{" else (text,) for text in OPERAND.findall(rest))
    return Instruction(" ".join(statement.split()), guard or "", bool(negated), opcode, operands)

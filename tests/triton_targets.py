"""Compile our Triton kernels for real GPUs with none present, and read what came out.

`record` runs an operator's launcher on meta tensors and catches its launches, so that what is compiled is what the
launcher's heuristics pick: kernel, argument types, constants, warps. `compile_for` hands one of them to Triton's compiler
and its bundled `ptxas` (or LLVM's AMD back end). The result says what it takes (registers, stack, spills, shared memory) and
gives the machine code's innermost loops.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simba_compile.kernels.gpu import runtime

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one block may have. Code for sm_80 also runs on sm_86 and sm_89, which have less than its 163 KiB.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    number: str = "fp32"  # what a Python float is: Triton's own launches say fp32, Inductor's fp64

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton compiles, specialised as its run time does it, and the compiler's options."""
        signature, constants, attributes = {}, {}, {}
        named = dict(zip(self.kernel.arg_names, self.args, strict=False))
        named |= {name: value for name, value in self.constants.items() if name not in OPTIONS}
        for place, name in enumerate(self.kernel.arg_names):
            value, free = named[name], self.kernel.params[place].do_not_specialize
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                if value.data_ptr() % 16 == 0:  # of a meta tensor, its offset
                    attributes[(place,)] = [["tt.divisibility", 16]]
            elif name in self.constants or value is None or (type(value) is int and value == 1 and not free):
                signature[name], constants[(place,)] = "constexpr", value
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not free:
                    attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = self.number
        options = {name: value for name, value in self.constants.items() if name in OPTIONS}
        return ASTSource(self.kernel, signature, constants, attributes), options


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on a target. Sizes in bytes, registers for each thread."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int
    warps: int  # of a block
    ttir: str  # what Triton made of the Python source
    ptx: str  # what came of that; empty for AMD
    cubin: bytes  # empty for AMD

    @functools.cached_property
    def sass(self) -> str:
        """NVIDIA's machine code."""
        return _cuobjdump("-sass", self.cubin)

    def loops(self) -> list[Counter[str]]:
        """The opcodes of every loop of the SASS, without the loops in it; dots and modifiers included (``LDG.E.64``)."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", self.sass)
        code = [(int(place, 16), opcode, rest) for place, opcode, rest in lines]
        # Shuffles of lanes that might have diverged stand at the end, out of line, and jump back: those are no loops.
        last = next((place for place, opcode, _ in code if opcode == "ENDCOLLECTIVE"), code[-1][0])
        spans = []
        for place, opcode, rest in code:
            target = re.search(r"0x([0-9a-f]+)", rest)
            if opcode.startswith("BRA") and target and int(target[1], 16) < place < last:
                spans.append((int(target[1], 16), place))
        return [
            Counter(
                opcode
                for place, opcode, _ in code
                if span[0] <= place <= span[1]
                and not any(b != span and span[0] <= b[0] <= place <= b[1] <= span[1] for b in spans)
            )
            for span in spans
        ]


def count(loop: Counter[str], *prefixes: str) -> int:
    """How many instructions of a loop have opcodes that start so."""
    return sum(number for opcode, number in loop.items() if opcode.startswith(prefixes))


def record(operator: Callable, *args: Any) -> list[Launch]:
    """The launches of an operator's launcher in `simba_compile.kernels.gpu`; nothing runs, its tensors become meta tensors.

    Strides stay. The launcher has to start its kernels by ``runtime.launch``.
    """
    launches = []

    def catch(kernel: Callable, grid: tuple[int, ...], *values: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, grid, values, constants))

    before, runtime.launch = runtime.launch, catch
    try:
        operator(*(value.to("meta") if isinstance(value, Tensor) else value for value in args))
    finally:
        runtime.launch = before
    return launches


def compile_for(target: str, launch: Launch) -> Compiled:
    """Compile one launch for a target of `TARGETS`; equal ones are compiled once."""
    source, options = launch.source()
    key = str((target, launch.kernel.__name__, source.signature, source.constants, source.attrs, options))
    if key not in _built:
        _built[key] = _compile(target, source, options)
    return _built[key]


_built: dict[str, Compiled] = {}


def _compile(target: str, source: ASTSource, options: dict[str, Any]) -> Compiled:
    built = triton.compile(source, target=TARGETS[target], options=options)
    name, shared, warps, ttir = built.metadata.name, built.metadata.shared, built.metadata.num_warps, built.asm["ttir"]
    if TARGETS[target].backend == "hip":
        assembly = built.asm["amdgcn"]
        of = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", assembly, re.M)}
        spilled = of["vgpr_spill_count"] + of["sgpr_spill_count"]
        return Compiled(name, of["vgpr_count"], of["private_segment_fixed_size"], spilled, shared, warps, ttir, "", b"")
    cubin = built.asm["cubin"]
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin)))
    registers, stack, spilled = (int(found[what]) for what in ("REG", "STACK", "LOCAL"))
    return Compiled(name, registers, stack, spilled, shared, warps, ttir, built.asm["ptx"], cubin)


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def check(target: str, launches: list[Launch]) -> list[Compiled]:
    """Compile the launches; each must fit the target's shared memory and have neither stack nor spills."""
    assert launches
    done = [compile_for(target, launch) for launch in launches]
    for built in done:
        assert built.shared <= SHARED[target], f"{built.name} asks for {built.shared} bytes of shared memory on {target}"
        assert built.stack == built.spilled == 0, f"{built.name} has a stack of {built.stack} and spills {built.spilled}"
    return done

"""Runs our Triton kernels in Triton's interpreter for another process, that traces them for a GPU: `test_inductor_launches`.

Reads pickled calls from its standard input, (kernel, grid, arguments, memory), and answers with the memory after each. A
tensor among the arguments is a `Place` in that memory.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import pkgutil
import sys
import traceback
from typing import Any


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor: a view of one of the storages that a call brings along."""

    storage: int
    dtype: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def main() -> None:
    """Answer until the input ends."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from simba_compile.kernels import gpu

    modules = [importlib.import_module(f"{gpu.__name__}.{module.name}") for module in pkgutil.iter_modules(gpu.__path__)]
    kernels = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == module.__name__
    }
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else prints does not come between
    while True:
        try:
            name, grid, arguments, memory = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        held = [torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0) for raw in memory]
        for argument, value in arguments.items():
            if isinstance(value, Place):
                view = torch.empty(0, dtype=value.dtype)
                storage = held[value.storage].untyped_storage()
                arguments[argument] = view.set_(storage, value.offset, value.size, value.stride)
        try:
            kernels[name][grid](**arguments)
            answer: Any = [bytes(raw.numpy()) if raw.numel() else b"" for raw in held]
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    from interpreter_server import main as serve  # under its own name, for what is pickled

    serve()

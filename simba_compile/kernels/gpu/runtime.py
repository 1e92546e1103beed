"""How a launcher starts its kernel."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Parameters that follow the length of a sequence, or how much of it a call reads. Triton would compile a kernel anew for a
# 1, for a multiple of 16 and for any other number in each of them, and a pruned model has another length in every layer.
LENGTHS = ("tokens", "kept", "k", "last", "chunk", "chunks", "spans", "rows", "inner_rows", "index_batch")

# By what Triton compiles a kernel for: what it compiled, and the values of the constants that come behind its arguments.
COMPILED: dict[tuple, tuple[Any, list[Any]]] = {}


def launch(kernel: Any, grid: tuple[int], *args: Any, **constants: Any) -> None:
    """Start a Triton kernel on the device of its tensors.

    While a graph is traced (a tensor is not a plain one), the launch becomes a node of it, so that Inductor compiles the
    kernel into its own code. Called directly, that detour would cost a millisecond.

    A launch like one before goes straight to what was compiled for that one: to find it takes Triton longer than to start
    it. What triton.knobs says of compiling counts at the first one.

    Parameters
    ----------
    kernel : triton.JITFunction
        The kernel. Its ``tl.constexpr`` parameters come last.
    grid : tuple of one int
        Programs, up to 2³¹ − 1.
    *args
        The kernel's arguments: tensors, sizes, strides.
    **constants
        Its ``tl.constexpr`` parameters, and `num_warps` and the like.
    """
    key: list[Any] = [id(kernel), *constants, *constants.values()]
    first: Any = None
    for value in args:
        kind = value.__class__
        if kind is int:
            key.append((value == 1) + 2 * (value & 15 == 0) + 4 * (value >> 31))
        elif kind is Tensor or kind is Parameter:
            first = value if first is None else first
            key += value.dtype, value.data_ptr() & 15 == 0
        elif isinstance(value, Tensor):
            torch.library.wrap_triton(kernel)[grid](*args, **constants)
            return
        else:
            key.append(kind)
    key.append(first.get_device())
    known = COMPILED.get(tuple(key))
    with torch.cuda.device_of(first):
        if known is not None:
            compiled, trailing = known
            compiled[(grid[0], 1, 1)](*args, *trailing)
            return
        compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)  # Triton 3.9 warns where it is not told
    if compiled is not None and torch.version.hip is None:  # an interpreter compiles nothing; AMD's also asks for sizes
        COMPILED[tuple(key)] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]


def expect(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check the shapes of tensors, given by name with the shape that each must have: a kernel reads what it is told to."""
    for name, (value, shape) in given.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {shape}.")


def expect_groups(groups: int, **given: int) -> None:
    """Check that each group has as many of something, given by its name: a kernel would read beyond the last group."""
    for name, count in given.items():
        if groups < 1 or count % groups:
            raise ValueError(f"there are {count} {name}; expected a multiple of {groups} (the groups).")


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; an H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return (size + block - 1) // block


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`, which kernels are compiled for: no symbol."""
    return 1 << (int(size) - 1).bit_length()


def flat(parameter: Tensor | None) -> Tensor | None:
    """A parameter of one axis, contiguous."""
    return None if parameter is None else parameter.contiguous()

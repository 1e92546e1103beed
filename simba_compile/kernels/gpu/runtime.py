"""How a launcher starts its kernel."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

# Parameters that follow the length of a sequence. Triton would compile a kernel anew for a 1, for a multiple of 16 and for
# any other number in each of them, and a pruned model has another length in every layer.
LENGTHS = ("tokens", "kept", "k", "chunk", "chunks", "spans", "rows", "inner_rows", "index_batch")


def launch(kernel: Callable, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Start a Triton kernel on the device of its tensors.

    While a graph is traced (a tensor is not a plain one), the launch becomes a node of it, so that Inductor compiles the
    kernel into its own code. Called directly, that detour would cost a millisecond.

    Parameters
    ----------
    kernel : triton.JITFunction
        The kernel.
    grid : tuple of int
        Programs along each axis. Only the first axis can be large (2³¹ − 1; the others 65535).
    *args
        The kernel's arguments: tensors, sizes, strides.
    **constants
        Its ``tl.constexpr`` parameters, and `num_warps` and the like.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if any(type(value) not in (Tensor, Parameter) for value in tensors):
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*args, **constants)  # type: ignore[index]


def expect(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check the shapes of tensors, given by name with the shape that each must have: a kernel reads what it is told to."""
    for name, (value, shape) in given.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {shape}.")


def expect_groups(groups: int, **given: int) -> None:
    """Check that each group has as many of something, given by its name: a kernel would read beyond the last group."""
    for name, count in given.items():
        if groups < 1 or count % groups:
            raise ValueError(f"there are {count} {name}; expected a multiple of {groups} (the groups).")


def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; an H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return (size + block - 1) // block


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return triton.next_power_of_2(size)


def flat(parameter: Tensor | None) -> Tensor | None:
    """A parameter of one axis, contiguous."""
    return None if parameter is None else parameter.contiguous()

"""How a C kernel under ``cpu/`` is called, through ctypes.

Everything that C takes on trust is checked or arranged before, with what is here: device, dtype, shape, and a stride of 1
along the last axis (a tensor without it is copied). Where there is no library that fits, `available` is False and plain
torch runs instead.
"""

import struct

import torch
from torch import Tensor

from simba_compile.kernels.native.library import library

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MISSING = (0, 0, 0)
ROWS, ROW = "batch token channel", "batch channel"  # the axes of a sequence, and of one token
OUT_OF_MEMORY, OUT_OF_RANGE = 1, 2  # cpu/simba.h


def available() -> bool:
    """Whether the native kernels can run."""
    return library() is not None


def call(name: str, dtype: torch.dtype, words: list[int]) -> None:
    """Run a kernel on elements of this dtype; `words` are the fields of its struct in cpu/simba.h, 64 bits each."""
    args = struct.pack(f"{len(words)}q", *words)  # half the time of an array of ctypes
    failure = getattr(library(), "simba_" + name)(args, DTYPES[dtype], torch.get_num_threads())
    if failure == OUT_OF_MEMORY:
        raise MemoryError(f"simba::{name} could not allocate its scratch memory.")
    if failure == OUT_OF_RANGE:
        raise IndexError(f"index holds positions outside 0..{words[1] - 1}.")


def by_rows(x: Tensor) -> Tensor:
    """The tensor, or a copy of it whose last axis has a stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def view_of(x: Tensor | None) -> tuple[int, int, int]:
    """Memory, and the strides of the first two axes; zeros for what is missing."""
    return MISSING if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def pointer(x: Tensor | None) -> int:
    """Memory; 0 for what is missing."""
    return 0 if x is None else x.data_ptr()


def bits(value: float) -> int:
    """A double as the 64-bit word that C reads it from."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def as_constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter or a state in this type, contiguous: itself where it is so already."""
    return x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()


def expect(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Refuse a tensor on another device, of another shape or, if one is given, of another dtype."""
    if value is None:
        return
    if not value.is_cpu or value.shape != shape or (dtype is not None and value.dtype != dtype):
        raise ValueError(
            f"{name} is {tuple(value.shape)}, {value.dtype}, on {value.device}; expected {shape}, {dtype or 'any dtype'}, "
            "on the CPU."
        )


def expect_on_cpu(name: str, value: Tensor) -> None:
    """Refuse a tensor on another device."""
    if not value.is_cpu:
        expect(name, value, tuple(value.shape), None)  # which it refuses


def flat_rows(x: Tensor) -> Tensor:
    """The rows of a tensor as (row, channel), without a copy where it can be."""
    rows = by_rows(x)
    return rows if rows.dim() == 2 else rows.flatten(0, -2) if rows.dim() > 2 else rows[None]


def stream_of(
    name: str, stream: Tensor, index: Tensor | None, shape: torch.Size, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, list[int], list[int]]:
    """A residual stream, or its tokens at an index, that something of this shape is added to, as C wants it.

    Returns memory, index, the numbers of its tokens and of kept ones, and the strides of batch and row.
    """
    if index is None:
        expect(name, stream, tuple(shape), dtype)
        rows = flat_rows(stream)
        return rows, None, [rows.shape[0], rows.shape[0]], [0, rows.stride(0)]
    if len(shape) != 3 or stream.dim() != 3 or index.shape != shape[:2]:
        raise ValueError(
            f"index is {tuple(index.shape)}, {name} {tuple(stream.shape)} and what is added {tuple(shape)}; expected "
            f"an index (batch, kept), {name} (batch, token, channel) and (batch, kept, channel)."
        )
    tokens = stream.shape[1]
    expect(name, stream, (shape[0], tokens, shape[2]), dtype)
    expect("index", index, tuple(shape[:2]), torch.int64)
    rows = by_rows(stream)
    return rows, index.contiguous(), [tokens, shape[1]], [rows.stride(0), rows.stride(1)]

"""The C kernel of linear layers, ``cpu/linear.h``."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import (
    DTYPES,
    as_constant,
    by_rows,
    call,
    expect,
    expect_on_cpu,
    flat_rows,
    pointer,
    stream_of,
)
from simba_compile.kernels.native.library import library
from simba_compile.kernels.reference import compute_dtype

THREADS = 8  # up to which sharing out the work was thought through
AVX2 = 8  # lanes
LARGE = 1 << 18  # weights that do not come out of a cache, so that how they are read decides
MANY = 96  # rows that make up for the call's overhead with smaller ones
MANY_HALVES = 8  # the same of halves, where torch has no instructions for them
WEAK = range(4, 16)  # rows for which MKL does not read weights at the speed of memory
LARGE_OF_MKL = 1 << 19  # weights from which it shows


@cache
def mkl_is_at_home() -> bool:
    """Whether torch's products of float32 are MKL's and the CPU is Intel's, for which MKL is made."""
    lib = library()
    return lib is not None and bool(lib.simba_is_intel()) and torch.backends.mkl.is_available()


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies halves of this dtype, as far as torch says."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not say
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    return capabilities.get(f"avx512_{kind}") is not False or bool(capabilities.get(f"amx_{kind}"))


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel beats torch's product: torch has no MKL made for this CPU, MKL is weak, or the CPU has no halves.

    docs/kernels-cpu.md has the measurements. Torch's products of halves use instructions that this kernel does not use,
    where the CPU has them.
    """
    lib = library()
    if lib is None or not x.numel() or weight.stride(-1) != 1:
        return False
    if torch.get_num_threads() > THREADS or lib.simba_lanes() < AVX2:
        return False
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:
        if mkl_is_at_home():
            return rows in WEAK and weight.numel() >= LARGE_OF_MKL
        return rows >= MANY or weight.numel() >= LARGE
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if has_instructions(x.dtype):
        return x.dtype == torch.bfloat16 and rows == 1
    return rows >= MANY_HALVES or weight.numel() >= LARGE


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, index: Tensor | None) -> Tensor:
    """See `simba_compile.kernels.ops.linear.linear`."""
    if x.dtype not in DTYPES or x.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and weight {tuple(weight.shape)}; expected x (..., depth) in float32, "
            "float64, bfloat16 or float16 and weight (column, depth)."
        )
    columns, depth = weight.shape
    expect_on_cpu("x", x)
    expect("weight", weight, (columns, x.shape[-1]), x.dtype)
    expect("bias", bias, (columns,), None)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype)
    rows, weight, bias = flat_rows(x), by_rows(weight), as_constant(bias, compute_dtype(x.dtype))
    counts, strides = [rows.shape[0], rows.shape[0]], [0, 0]
    if add is not None:
        add, index, counts, strides = stream_of("add", add, index, out.shape, x.dtype)
    elif index is not None:
        raise ValueError(f"index is {tuple(index.shape)}; expected none, or an `add` (batch, token, column) that it is of.")
    if out.numel():
        words = [rows.shape[0], *counts, depth, columns]
        words += [pointer(rows), pointer(weight), rows.stride(0), weight.stride(0)]
        call("linear", x.dtype, [*words, pointer(bias), pointer(add), *strides, pointer(index), pointer(out)])
    return out

"""The C kernels that select and move tokens, ``cpu/tokens.c``."""

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import call, expect, expect_on_cpu, pointer


def gather(x: Tensor, index: Tensor) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.gather`: tokens in axis 1, everything behind them contiguous."""
    if x.dim() < 2 or index.dim() != 2 or (x.numel() and not x[0, 0].is_contiguous()):
        raise ValueError(
            f"x is {tuple(x.shape)} with strides {x.stride()} and index {tuple(index.shape)}; expected (batch, token, ...), "
            "contiguous behind the tokens, and (batch, kept)."
        )
    batch, tokens = x.shape[:2]
    kept = index.shape[1]
    expect_on_cpu("x", x)
    expect("index", index, (index.shape[0], kept), torch.int64)
    if batch not in (1, index.shape[0]):
        raise ValueError(f"x has {batch} sequences and index {index.shape[0]}; expected as many, or one in x for all.")
    index, size = index.contiguous(), x.element_size()
    out = torch.empty(index.shape[0], kept, *x.shape[2:], dtype=x.dtype)
    if out.numel():
        row = out[0, 0].numel() * size
        strides = [0 if batch == 1 else x.stride(0) * size, x.stride(1) * size]
        words = [index.shape[0], tokens, kept, row, *strides, pointer(x), pointer(index), pointer(out)]
        call("gather", torch.float32, words)  # bytes: of any type
    return out


def select(scores: Tensor, k: int, first: int, last: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.select`."""
    if scores.dim() != 2 or min(first, last) < 0 or not first + last <= k <= scores.shape[1]:
        raise ValueError(
            f"scores is {tuple(scores.shape)}, k {k}, first {first}, last {last}; expected (batch, token) and "
            "first + last <= k <= tokens."
        )
    expect_on_cpu("scores", scores)
    scores = scores.to(torch.float64).contiguous()
    out = torch.empty(scores.shape[0], k, dtype=torch.int64)
    if out.numel():
        call("select", torch.float64, [*scores.shape, k, first, last, pointer(scores), pointer(out)])
    return out

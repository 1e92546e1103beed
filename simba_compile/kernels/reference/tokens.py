"""Selecting tokens, and moving them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CRITERIA = ("recent", "uniform", "random")  # that do not look at the tokens


def select(scores: Tensor, k: int, first: int = 0, last: int = 1) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.select`."""
    batch, tokens = scores.shape
    middle = scores[:, first : tokens - last]
    order = middle.flip(1).sort(dim=1, descending=True, stable=True).indices  # flipped: of equals the later comes first
    best = tokens - last - 1 - order[:, : k - first - last]
    ends = torch.arange(tokens, device=scores.device).expand(batch, tokens)
    return torch.cat([ends[:, :first], best.sort(1).values, ends[:, tokens - last :]], 1)


def token_scores(x: Tensor, k: int, criterion: str, seed: int = 0) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.token_scores`."""
    batch, tokens = x.shape[:2]
    if criterion == "recent":
        scores = torch.arange(tokens, dtype=torch.float64, device=x.device)
    elif criterion == "uniform":
        even = (torch.arange(1, k + 1, device=x.device) * tokens) // k - 1
        scores = torch.zeros(tokens, dtype=torch.float64, device=x.device).scatter_(0, even, 1.0)
    else:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, tokens, dtype=torch.float64, generator=generator).to(x.device)
    return scores.expand(batch, tokens).contiguous()


def pool_heads(a: Tensor, b: Tensor, pool: str) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.pool_heads`."""
    return torch.logaddexp(2 * a, 2 * b) / 2 if pool == "l2" else torch.maximum(a, b)


def gather(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.gather`."""
    sizes = list(x.shape)
    sizes[0], sizes[dim] = index.shape
    return x.expand([sizes[0], *x.shape[1:]]).gather(dim, _along(dim, index, sizes))


def _along(dim: int, index: Tensor, sizes: Sequence[int]) -> Tensor:
    """The places of tokens (batch, k) for each number of a value of these sizes, which has k tokens in axis `dim`."""
    shape = [1] * len(sizes)
    shape[0], shape[dim] = index.shape
    return index.view(shape).expand(sizes)


def scatter(full: Tensor, index: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.scatter`."""
    return full.scatter(dim, _along(dim, index, x.shape), x)


def restore(base: Tensor, values: list[Tensor], positions: list[Tensor]) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.restore`."""
    full = base.to(values[-1].dtype, copy=True)
    for value, index in zip(values, positions, strict=True):
        full.scatter_(1, _along(1, index, value.shape), value.to(full.dtype))
    return full


# A NaN that no arithmetic makes, as the integer of its bits. Widened, bfloat16's becomes float32's and that float64's, as
# where a prompt ran under autocast and decoding does not; torch's casts of float16 do not keep the bits.
_MARKS = {
    torch.float64: (torch.int64, 0x7FF8_A000_0000_0000),
    torch.float32: (torch.int32, 0x7FC5_0000),
    torch.bfloat16: (torch.int16, 0x7FC5),
    torch.float16: (torch.int16, 0x7E5B),
}


def cache_entries(x: Tensor, positions: Tensor, tokens: int, dim: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.cache_entries`."""
    integer, mark = _MARKS[x.dtype]
    full = torch.full([*x.shape[:dim], tokens, *x.shape[dim + 1 :]], mark, dtype=integer, device=x.device)
    return scatter(full, positions, x.view(integer), dim).view(x.dtype)


def is_marked(x: Tensor) -> Tensor:
    """Which numbers are the mark that `cache_entries` leaves."""
    if x.dtype not in _MARKS:
        return torch.zeros_like(x, dtype=torch.bool)
    integer, mark = _MARKS[x.dtype]
    return x.contiguous().view(integer) == mark


def last_tokens(x: Tensor, k: int, dim: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.last_tokens`."""
    have = min(k, x.shape[dim])
    there = x.narrow(dim, x.shape[dim] - have, have)
    return there if have == k else F.pad(there, [0, 0] * (x.dim() - 1 - dim) + [k - have, 0])

"""Selecting tokens, and moving them: what stands between the mixers of a pruned graph."""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.native import tokens as native
from simba_compile.kernels.ops.dispatch import expect_pool, fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable, undifferentiable

# --- selecting ---------------------------------------------------------------------------------------------------------


@operator("(Tensor scores, SymInt k, SymInt first, SymInt last) -> Tensor")
def select(scores: Tensor, k: int, first: int, last: int) -> Tensor:
    """The k best tokens of every sequence, in their order.

    Parameters
    ----------
    scores : Tensor
        (batch, token). NaN counts as the largest; of equal scores the later token wins.
    k : int
        How many tokens stay; first + last ≤ k ≤ tokens.
    first, last : int
        How many tokens at either end stay whatever their score.

    Returns
    -------
    Tensor
        (batch, k) int64, ascending.
    """
    if scores.dim() != 2 or first < 0 or last < 0:
        raise ValueError(f"scores is {tuple(scores.shape)}, first {first}, last {last}; expected (batch, token), 0 or more.")
    if not first + last <= k <= scores.shape[1]:
        raise ValueError(f"k is {k}; expected {first} + {last} (the protected ends) to {scores.shape[1]} (the tokens).")
    return implementation("select", scores)(scores, k, first, last)


@fake("select")
def _(scores: Tensor, k: int, first: int, last: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


@operator("(Tensor x, SymInt k, str criterion, int seed) -> Tensor")
def token_scores(x: Tensor, k: int, criterion: str, seed: int) -> Tensor:
    """Scores that do not look at the tokens, to compare influence with.

    Parameters
    ----------
    x : Tensor
        (batch, token, ...): only its sizes and its device are read.
    k : int
        How many tokens will be selected.
    criterion : {"recent", "uniform", "random"}
        "recent": the later the better; "uniform": k evenly spaced tokens, the last among them; "random": independent
        random numbers, drawn from `seed`.

    Returns
    -------
    Tensor
        (batch, token) in float64.
    """
    if criterion not in reference.CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; expected one of {', '.join(reference.CRITERIA)}.")
    if not 0 <= k <= x.shape[1]:
        raise ValueError(f"k is {k}; expected 0 to {x.shape[1]} (the tokens).")
    return reference.token_scores(x, k, criterion, seed)


@fake("token_scores")
def _(x: Tensor, k: int, criterion: str, seed: int) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


undifferentiable("token_scores")


@operator("(Tensor a, Tensor b, str pool) -> Tensor")
def pool_heads(a: Tensor, b: Tensor, pool: str) -> Tensor:
    """The scores of tokens over the channels of two Mamba heads, from those over each head's.

    Parameters
    ----------
    a, b : Tensor
        (batch, token): logarithms, as `influence` returns them.
    pool : {"max", "absmax", "l2"}
        What they were pooled by: see `influence`.

    Returns
    -------
    Tensor
        (batch, token).
    """
    expect_pool(pool)
    return reference.pool_heads(a, b, pool)


@fake("pool_heads")
def _(a: Tensor, b: Tensor, pool: str) -> Tensor:
    return torch.empty_like(a)


undifferentiable("pool_heads")


# --- moving ------------------------------------------------------------------------------------------------------------


@operator("(Tensor x, Tensor index, int dim) -> Tensor")
def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The tokens of every sequence at the given positions.

    Parameters
    ----------
    x : Tensor
        Axis 0 is the batch (or 1: the same for each sequence) and axis `dim` ≥ 1 the tokens.
    index : Tensor
        (batch, k) int64.
    dim : int
        The axis of the tokens.

    Returns
    -------
    Tensor
        `x` with axis `dim` of size k.
    """
    if index.dim() != 2:
        raise ValueError(f"index is {tuple(index.shape)}; expected (batch, k).")
    if not 1 <= dim < x.dim():
        raise ValueError(f"dim is {dim}, and x has {x.dim()} axes; expected an axis from 1 on.")
    run = implementation("gather", x, index)
    if run is not native.gather:
        return run(x, index, dim)
    has_whole_rows = dim == 1 and 0 not in x.shape[:2] and x[0, 0].is_contiguous()
    return run(x, index) if has_whole_rows else reference.gather(x, index, dim)


@fake("gather")
def _(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return x.new_empty([index.shape[0], *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :]])


def _gather_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index, ctx.dim = inputs
    ctx.save_for_backward(index)
    ctx.shape = x.shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    shape = [1] * grad.dim()
    shape[0], shape[ctx.dim] = index.shape
    zeros = grad.new_zeros([grad.shape[0], *ctx.shape[1:]])
    full = zeros.scatter_add(ctx.dim, index.view(shape).expand(grad.shape), grad)
    return full.sum(0, keepdim=True) if ctx.shape[0] == 1 and grad.shape[0] != 1 else full, None, None


differentiable("gather", _gather_backward, _gather_setup)


@operator("(Tensor full, Tensor index, Tensor x, int dim) -> Tensor")
def scatter(full: Tensor, index: Tensor, x: Tensor, dim: int) -> Tensor:
    """A copy of `full` in which the tokens at `index` are those of `x`: puts pruned tokens back among the others.

    Parameters
    ----------
    full : Tensor
        Axis 0 is the batch and axis `dim` the tokens.
    index : Tensor
        (batch, k) int64, no position twice.
    x : Tensor
        As `full`, with k tokens.
    dim : int
        The axis of the tokens.

    Returns
    -------
    Tensor
        As `full`.
    """
    _expect_kept(x, full, index, dim)
    return reference.scatter(full, index, x.to(full.dtype), dim)


def _expect_kept(x: Tensor, full: Tensor, index: Tensor, dim: int) -> None:
    """Raise ValueError where x has not as many tokens as positions, and all else as the full-length value."""
    expected = (*full.shape[:dim], index.shape[1], *full.shape[dim + 1 :])
    if x.shape != expected:
        raise ValueError(f"kept tokens are {tuple(x.shape)}; expected {expected}, by their positions and all tokens.")


@fake("scatter")
def _(full: Tensor, index: Tensor, x: Tensor, dim: int) -> Tensor:
    return full.new_empty(full.shape)


def _scatter_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, index, x, ctx.dim = inputs
    ctx.save_for_backward(index)
    ctx.dtype = x.dtype


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    to_x = torch.ops.simba.gather(grad, index, ctx.dim)
    return torch.ops.simba.scatter(grad, index, torch.zeros_like(to_x), ctx.dim), None, to_x.to(ctx.dtype), None


differentiable("scatter", _scatter_backward, _scatter_setup)


@operator("(Tensor base, Tensor[] values, Tensor[] positions) -> Tensor")
def restore(base: Tensor, values: list[Tensor], positions: list[Tensor]) -> Tensor:
    """Values of a residual stream at full length: where tokens left, what they were on leaving.

    Parameters
    ----------
    base : Tensor
        (batch, token, ...): the stream before the first pruning.
    values : list of Tensor
        (batch, k, ...) with k falling: the stream after each pruning.
    positions : list of Tensor
        (batch, k) int64, no position twice: where in the sequence each one's tokens stand; every list is a subset of the one
        before.

    Returns
    -------
    Tensor
        As `base`, in the dtype of the last values: at each position, the latest value that has it.
    """
    if not values or len(values) != len(positions):
        raise ValueError(f"there are {len(values)} values and {len(positions)} positions; expected one or more of each.")
    for value, index in zip(values, positions, strict=True):
        _expect_kept(value, base, index, 1)
    return reference.restore(base, values, positions)


@fake("restore")
def _(base: Tensor, values: list[Tensor], positions: list[Tensor]) -> Tensor:
    return torch.empty_like(base, dtype=values[-1].dtype)


def _restore_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    base, values, positions = inputs
    ctx.save_for_backward(*positions)
    ctx.dtypes = (base.dtype, [value.dtype for value in values])


def _restore_backward(ctx: Any, grad: Tensor) -> tuple:
    positions, (dtype, dtypes) = ctx.saved_tensors, ctx.dtypes
    grads = []
    for index, kind in zip(reversed(positions), reversed(dtypes), strict=True):  # the latest value owns a position
        taken = torch.ops.simba.gather(grad, index, 1)
        grads.append(taken.to(kind))
        grad = torch.ops.simba.scatter(grad, index, torch.zeros_like(taken), 1)
    return grad.to(dtype), grads[::-1], [None] * len(positions)


differentiable("restore", _restore_backward, _restore_setup)


@operator("(Tensor x, Tensor positions, SymInt tokens, int dim) -> Tensor")
def cache_entries(x: Tensor, positions: Tensor, tokens: int, dim: int) -> Tensor:
    """Keys or values of the kept tokens at their places among all; the places of pruned tokens carry a mark.

    The mark is a NaN with bits of its own: copies, concatenations, selections and the widening of bfloat16 carry it along,
    and arithmetic that does not know it gives NaN. `simba_compile.kernels.reference.is_marked` tells it.

    Parameters
    ----------
    x : Tensor
        Axis 0 is the batch and axis `dim` the kept tokens.
    positions : Tensor
        (batch, k) int64, no position twice: where in the sequence they stand.
    tokens : int
        How long the sequence is.
    dim : int
        The axis of the tokens.

    Returns
    -------
    Tensor
        As `x`, with `tokens` entries in axis `dim`.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, which has no NaN to mark pruned tokens with; expected a floating-point type.")
    return reference.cache_entries(x.contiguous(), positions, tokens, dim)


@fake("cache_entries")
def _(x: Tensor, positions: Tensor, tokens: int, dim: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], tokens, *x.shape[dim + 1 :]])


def _entries_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, positions, _, ctx.dim = inputs
    ctx.save_for_backward(positions)


def _entries_backward(ctx: Any, grad: Tensor) -> tuple:
    (positions,) = ctx.saved_tensors
    return torch.ops.simba.gather(grad, positions, ctx.dim), None, None, None


differentiable("cache_entries", _entries_backward, _entries_setup)


@operator("(Tensor x, SymInt k, int dim) -> Tensor")
def last_tokens(x: Tensor, k: int, dim: int) -> Tensor:
    """The last k entries along an axis, zeros in front where there are fewer: a convolution's window for decoding.

    Parameters
    ----------
    x : Tensor
        Any shape.
    k : int
        How many.
    dim : int
        The axis, counted from the left.

    Returns
    -------
    Tensor
        As `x`, with k entries in axis `dim`, contiguous.
    """
    if not 0 <= dim < x.dim() or k < 0:
        raise ValueError(f"k is {k} and dim {dim}, of {x.dim()} axes; expected neither below 0, and one of the axes.")
    return reference.last_tokens(x, k, dim).clone(memory_format=torch.contiguous_format)


@fake("last_tokens")
def _(x: Tensor, k: int, dim: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], k, *x.shape[dim + 1 :]])


def _last_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.k, ctx.dim = inputs
    ctx.shape = x.shape


def _last_backward(ctx: Any, grad: Tensor) -> tuple:
    have = min(ctx.k, ctx.shape[ctx.dim])
    full = grad.new_zeros(ctx.shape)
    full.narrow(ctx.dim, ctx.shape[ctx.dim] - have, have).copy_(grad.narrow(ctx.dim, ctx.k - have, have))
    return full, None, None


differentiable("last_tokens", _last_backward, _last_setup)


# --- marks that capture sets, and that lowering takes away ---------------------------------------------------------------


@operator("(Tensor[] values) -> Tensor[]")
def enter_experts(values: list[Tensor]) -> list[Tensor]:
    """What a mixture of experts reads: rows of tokens, (batch · token, ...), which it treats each by itself; a copy."""
    return [value.clone() for value in values]


@fake("enter_experts")
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


@operator("(Tensor x) -> Tensor")
def leave_experts(x: Tensor) -> Tensor:
    """What a mixture of experts gives, (batch · token, channel), row for row; a copy."""
    return x.clone()


@fake("leave_experts")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)

"""The operators ``torch.ops.simba.*``: schema, dispatch, shapes under fake tensors, gradients.

Each function below documents the operator of its name and is what the operator runs: the Triton kernel for tensors on a GPU,
the native kernel for tensors on the CPU where it was built, else `reference`. Channels are last: ``x`` is (batch, token,
channel). Tensors may be float32, float64, bfloat16 or float16; halves are computed in float32. Any strides are taken; the
last axis is read without a copy where its stride is 1.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from simba_compile.kernels import native, native_linear, native_ssd, reference
from simba_compile.kernels.reference import compute_dtype

log = logging.getLogger("simba_compile")

LIBRARY = torch.library.Library("simba", "DEF")
GPU = "cuda"  # the device type of AMD's GPUs too
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIES = ("select", "gather")  # whose Triton kernels take every dtype
SCAN_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool softplus"


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator ``simba::<its name>`` with this schema, on every device."""

    def register(function: Callable) -> Callable:
        LIBRARY.define(function.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
        _open_to_inductor(function)
        return function

    return register


def fake(name: str) -> Callable[[Callable], Callable]:
    """The decorated function gives the operator's output shapes."""
    return torch.library.register_fake(f"simba::{name}", lib=LIBRARY)


@cache
def _triton_kernels() -> dict[str, Callable]:
    """The Triton kernels by operator, loaded when a tensor on a GPU first needs one; none without triton."""
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed: on the GPU plain torch runs in place of our kernels, many times slower.")
        return {}
    from simba_compile.kernels import gpu

    return gpu.KERNELS


def _on_gpu(name: str, tensors: list[Tensor]) -> Callable | None:
    """The Triton kernel for these tensors, if there is one. The first of them decides about the dtype."""
    if not tensors or any(value.device.type != GPU for value in tensors):
        return None
    if name not in COPIES and tensors[0].dtype not in GPU_DTYPES:
        return None
    return _triton_kernels().get(name)


def _open_to_inductor(function: Callable) -> None:
    """Make an operator show its Triton kernels while AOTAutograd traces, as `torch.library.triton_op` does."""
    name = function.__name__

    def trace(mode: Any, operation: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _on_gpu(name, [value for value in args if isinstance(value, Tensor)]) is None:
            return mode.__torch_dispatch__(operation, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    torch.library.register_torch_dispatch(f"simba::{name}", FunctionalTensorMode, trace, lib=LIBRARY)


def implementation(name: str, *tensors: Tensor | None) -> Callable:
    """What runs the operator `name` on these tensors: the Triton kernel, the native one, or its reference."""
    given = [value for value in tensors if value is not None]
    triton_kernel = _on_gpu(name, given)
    if triton_kernel is not None:
        return triton_kernel
    if all(value.device.type == "cpu" for value in given) and native.available():
        for kernels in (native, native_ssd, native_linear):
            if hasattr(kernels, name):
                return getattr(kernels, name)
    return getattr(reference, name)


# --- scoring and selecting tokens ------------------------------------------------------------------------------------


@operator(
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? dt_bias, bool softplus, str pool, bool bias_in_decay)"
    " -> Tensor"
)
def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    pool: str,
    bias_in_decay: bool,
) -> Tensor:
    """The logarithm of each token's influence on the last output of a selective scan.

    ``log |Δy_T(t)[d]| = m + log|x_t Δ_t Σ_n C_T B_t exp(A S_t − m)|`` with ``S_t = Σ_{k>t} Δ_k`` and ``m = max_n A S_t``
    (arXiv 2505.20698, equation 4), pooled over the channels d.

    Parameters
    ----------
    x, dt : Tensor
        (batch, token, channel): the scan's input and its step sizes before bias and softplus.
    A : Tensor
        (channel, state).
    B, C : Tensor
        (batch, token, state). Of C, only the last token's row is read.
    dt_bias : Tensor, optional
        (channel).
    softplus : bool
        Whether Δ = softplus(dt + dt_bias); else the sum itself.
    pool : {"max", "absmax", "l2"}
        "max": the largest signed Δy over the channels, so only channels where it is positive count and a token with none
        gets -inf; "absmax": the largest magnitude; "l2": the L2 norm over channels.
    bias_in_decay : bool
        Whether S sums Δ (the exact gradient) or softplus(dt) without the bias (as the paper does).

    Returns
    -------
    Tensor
        (batch, token) in float64. -inf for an influence of zero, NaN where an input is NaN. No gradient.
    """
    if pool not in reference.POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {', '.join(reference.POOLS)}.")
    return implementation("influence", x, dt, A, B, C, dt_bias)(x, dt, A, B, C, dt_bias, softplus, pool, bias_in_decay)


@fake("influence")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


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
        "recent": the later the better; "uniform": k evenly spaced tokens, the last among them; "random": a permutation
        for each sequence drawn from `seed`.

    Returns
    -------
    Tensor
        (batch, token) in float64.
    """
    if criterion not in reference.CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; expected one of {', '.join(reference.CRITERIA)}.")
    return reference.token_scores(x, k, criterion, seed)


@fake("token_scores")
def _(x: Tensor, k: int, criterion: str, seed: int) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


@operator("(Tensor a, Tensor b, str pool) -> Tensor")
def pool_heads(a: Tensor, b: Tensor, pool: str) -> Tensor:
    """The scores of tokens over the channels of two Mamba heads, from those over each head's: see `influence`."""
    return torch.logaddexp(2 * a, 2 * b) / 2 if pool == "l2" else torch.maximum(a, b)


@fake("pool_heads")
def _(a: Tensor, b: Tensor, pool: str) -> Tensor:
    return torch.empty_like(a)


# --- moving tokens ---------------------------------------------------------------------------------------------------


@operator("(Tensor x, Tensor index, int dim) -> Tensor")
def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The tokens of every sequence at the given positions.

    Parameters
    ----------
    x : Tensor
        Axis 0 is the batch (or 1: the same for each sequence) and axis `dim` ≥ 1 the tokens.
    index : Tensor
        (batch, k) int64.

    Returns
    -------
    Tensor
        `x` with axis `dim` of size k.
    """
    if index.dim() != 2:
        raise ValueError(f"index is {tuple(index.shape)}; expected (batch, k).")
    run = implementation("gather", x, index)
    if run is not native.gather:
        return run(x, index, dim)
    rows = dim == 1 and (x.dim() == 2 or x[0, 0].is_contiguous()) if x.shape[0] and x.shape[1] else False
    return run(x, index) if rows else reference.gather(x, index, dim)


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
    """
    return reference.scatter(full, index, x.to(full.dtype), dim)


@fake("scatter")
def _(full: Tensor, index: Tensor, x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(full)


def _scatter_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, index, x, ctx.dim = inputs
    ctx.save_for_backward(index)
    ctx.dtype = x.dtype


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple:
    (index,) = ctx.saved_tensors
    to_x = torch.ops.simba.gather(grad, index, ctx.dim)
    return torch.ops.simba.scatter(grad, index, torch.zeros_like(to_x), ctx.dim), None, to_x.to(ctx.dtype), None


@operator("(Tensor base, Tensor[] values, Tensor[] positions) -> Tensor")
def restore(base: Tensor, values: list[Tensor], positions: list[Tensor]) -> Tensor:
    """Values of a residual stream at full length: where tokens left, what they were on leaving.

    Parameters
    ----------
    base : Tensor
        (batch, token, channel): the stream before the first pruning.
    values : list of Tensor
        (batch, k, channel) with k falling: the stream after each pruning.
    positions : list of Tensor
        (batch, k) int64: where in the sequence each one's tokens stand; every list is a subset of the one before.

    Returns
    -------
    Tensor
        (batch, token, channel) in the dtype of the last values: at each position, the latest value that has it.
    """
    full = base.to(values[-1].dtype, copy=True)
    for value, index in zip(values, positions, strict=True):
        full.scatter_(1, index[:, :, None].expand(value.shape), value.to(full.dtype))
    return full


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


@operator("(Tensor x, Tensor positions, SymInt tokens, int dim) -> Tensor")
def cache_entries(x: Tensor, positions: Tensor, tokens: int, dim: int) -> Tensor:
    """Keys or values of the kept tokens at their places among all; the places of pruned tokens carry a mark.

    The mark is a NaN with bits of its own: copies, concatenations and selections carry it along, and arithmetic that does
    not know it gives NaN. `simba_compile.kernels.reference.is_marked` tells it.

    Parameters
    ----------
    x : Tensor
        Axis 0 is the batch and axis `dim` the kept tokens.
    positions : Tensor
        (batch, k) int64: where in the sequence they stand.
    tokens : int
        How long the sequence is.

    Returns
    -------
    Tensor
        As `x`, with `tokens` entries in axis `dim`. No gradient.
    """
    return reference.cache_entries(x.contiguous(), positions, tokens, dim)


@fake("cache_entries")
def _(x: Tensor, positions: Tensor, tokens: int, dim: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], tokens, *x.shape[dim + 1 :]])


@operator("(Tensor x, SymInt k, int dim) -> Tensor")
def last_tokens(x: Tensor, k: int, dim: int) -> Tensor:
    """The last k entries along axis `dim`, zeros in front where there are fewer: a convolution's window for decoding."""
    return reference.last_tokens(x, k, dim).clone()


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


# --- marks that capture sets, and that lowering takes away ------------------------------------------------------------


@operator("(Tensor[] values) -> Tensor[]")
def enter_experts(values: list[Tensor]) -> list[Tensor]:
    """What a mixture of experts reads: rows of tokens, (batch · token, ...), which it treats each by itself."""
    return [value.clone() for value in values]


@fake("enter_experts")
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


@operator("(Tensor x) -> Tensor")
def leave_experts(x: Tensor) -> Tensor:
    """What a mixture of experts gives, row for row."""
    return x.clone()


@fake("leave_experts")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# --- the mixer -------------------------------------------------------------------------------------------------------


@operator(f"({SCAN_INPUTS}, Tensor? index) -> (Tensor, Tensor)")
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1 over the kept tokens (Gu & Dao 2023, equations 2 to 4).

    ``h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t`` and ``y_t = (C_t h_t + D x_t) silu(z_t)`` with ``Δ = softplus(dt + dt_bias)``.

    Parameters
    ----------
    x, dt, z : Tensor
        (batch, token, channel); without `z` there is no gate.
    A : Tensor
        (channel, state).
    B, C : Tensor
        (batch, token, state).
    D, dt_bias : Tensor, optional
        (channel).
    softplus : bool
        Whether Δ goes through softplus.
    index : Tensor, optional
        (batch, kept) int64: the tokens that the scan runs over, in this order. All of them unless given.

    Returns
    -------
    Tensor
        (batch, kept, channel) in x's dtype.
    Tensor
        (batch, channel, state): the last state, in float32 (float64 for float64).
    """
    run = implementation("selective_scan", x, dt, A, B, C, D, z, dt_bias, index)
    return run(x, dt, A, B, C, D, z, dt_bias, softplus, index)


@fake("selective_scan")
def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    state = x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=compute_dtype(x.dtype))
    return x.new_empty((x.shape[0], left(x, rest[-1]), x.shape[2])), state


@operator(
    f"(Tensor grad, Tensor? grad_state, {SCAN_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def selective_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of `selective_scan` over all its tokens for x, dt, A, B, C, D, z and dt_bias, in this order.

    That of a missing input is empty; those of A, D and dt_bias come in the compute type.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    return implementation("selective_scan_backward", grad, grad_state, *inputs)(grad, grad_state, *inputs, softplus)


@fake("selective_scan_backward")
def _(grad: Tensor, grad_state: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kind = compute_dtype(x.dtype)
    return empty_gradients((x, *rest[:7]), (x.dtype, x.dtype, kind, x.dtype, x.dtype, kind, x.dtype, kind))


def empty_gradients(inputs: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """The shapes of a scan's gradients: those of its inputs, and of size 0 for a missing one."""
    x = inputs[0]
    return tuple(
        x.new_empty(0 if value is None else value.shape, dtype=dtype) for value, dtype in zip(inputs, dtypes, strict=True)
    )


def _scan_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, index = inputs
    ctx.save_for_backward(*tensors, index)


def left(x: Tensor, index: Tensor | None) -> int:
    """How many tokens a scan of `x` runs over."""
    return x.shape[1] if index is None else index.shape[1]


def kept_of(values: list[Tensor | None], index: Tensor | None) -> list[Any]:
    """What a scan reads of inputs that have tokens."""
    return [value if value is None or index is None else torch.ops.simba.gather(value, index, 1) for value in values]


def gradients_of(
    inputs: list[Tensor | None], grads: list[Tensor], index: Tensor | None, along_tokens: tuple[int, ...]
) -> list[Tensor | None]:
    """A scan's gradients as those of its inputs: in their dtypes, and among all tokens where the scan read some of them."""
    found: list[Tensor | None] = []
    for i, (value, grad) in enumerate(zip(inputs, grads, strict=True)):
        if value is not None and index is not None and i in along_tokens:
            grad = torch.ops.simba.scatter(torch.zeros_like(value), index, grad, 1)
        found.append(None if value is None else grad.to(value.dtype))
    return found


def _scan_backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple:
    *inputs, index = ctx.saved_tensors
    x, dt, A, B, C, D, z, dt_bias = inputs
    if grad is None:
        grad = x.new_zeros((x.shape[0], left(x, index), x.shape[2]))
    u, step, b, c, gate = kept_of([x, dt, B, C, z], index)
    grads = torch.ops.simba.selective_scan_backward(grad, grad_state, u, step, A, b, c, D, gate, dt_bias, ctx.softplus)
    return *gradients_of(inputs, grads, index, (0, 1, 3, 4, 6)), None, None


@operator("(Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor")
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The causal depthwise convolution in front of the scan: ``out_t = silu(bias + Σ_k weight_k x_{t − width + 1 + k})``.

    Parameters
    ----------
    x : Tensor
        (batch, token, channel).
    weight : Tensor
        (channel, width).
    bias : Tensor, optional
        (channel).
    silu : bool
        Whether SiLU follows.

    Returns
    -------
    Tensor
        (batch, token, channel), contiguous.
    """
    return implementation("causal_conv1d", x, weight, bias)(x, weight, bias, silu).contiguous()


@fake("causal_conv1d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@operator("(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor, Tensor)")
def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `causal_conv1d` for x, weight and bias (the last one empty where there is no bias)."""
    return implementation("causal_conv1d_backward", grad, x, weight, bias)(grad, x, weight, bias, silu)


@fake("causal_conv1d_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    kind = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=kind),
        x.new_empty(0 if bias is None else bias.shape, dtype=kind),
    )


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.simba.causal_conv1d_backward(grad, x, weight, bias, ctx.silu)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None


@operator("(Tensor x, Tensor? weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over the last axis, in x's dtype, computed in float32 or wider."""
    return implementation("rms_norm", x, weight)(x, weight, eps)


@fake("rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    kind = compute_dtype(x.dtype)
    u, g = x.to(kind), grad.to(kind)
    inverse = torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + ctx.eps)
    normed = u * inverse
    dweight = None if weight is None else (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
    g = g if weight is None else g * weight.to(kind)
    dx = inverse * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight, None


@operator("(Tensor x, Tensor gate, Tensor? weight, float eps, SymInt groups) -> Tensor")
def gated_norm(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    """The norm after the scan of Mamba-2: `rms_norm` of ``x silu(gate)``, each of so many groups of channels by itself.

    Parameters
    ----------
    x, gate : Tensor
        (..., channel); they may differ in dtype.
    weight : Tensor, optional
        (channel).
    eps : float
        Is added to the mean of the squares.
    groups : int
        Divides the number of channels.

    Returns
    -------
    Tensor
        As `x`.
    """
    return implementation("gated_norm", x, gate, weight)(x, gate, weight, eps, groups)


@fake("gated_norm")
def _(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int) -> Tensor:
    return x.new_empty(x.shape)


def _gated_norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _gated_norm_backward(ctx: Any, grad: Tensor) -> tuple:
    x, gate, weight = ctx.saved_tensors
    kind = compute_dtype(x.dtype)
    u, z, g = x.to(kind), gate.to(kind), grad.to(kind)
    sigmoid = torch.sigmoid(z)
    grouped = (u * z * sigmoid).unflatten(-1, (ctx.groups, -1))
    inverse = torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + ctx.eps)
    normed = grouped * inverse
    dweight = None if weight is None else (g * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
    g = (g if weight is None else g * weight.to(kind)).unflatten(-1, (ctx.groups, -1))
    dy = (inverse * (g - normed * (g * normed).mean(-1, keepdim=True))).flatten(-2)
    dgate = dy * u * (sigmoid + z * sigmoid * (1 - sigmoid))
    return (dy * z * sigmoid).to(x.dtype), dgate.to(gate.dtype), dweight, None, None


# --- decoding one token ----------------------------------------------------------------------------------------------


@operator(f"(Tensor(a!) state, {SCAN_INPUTS}) -> Tensor")
def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """One step of `selective_scan`.

    Parameters
    ----------
    state : Tensor
        (batch, channel, state), updated in place.
    x, dt, z : Tensor
        (batch, channel).
    A : Tensor
        (channel, state).
    B, C : Tensor
        (batch, state).
    D, dt_bias : Tensor, optional
        (channel).
    softplus : bool
        Whether Δ goes through softplus.

    Returns
    -------
    Tensor
        (batch, channel).
    """
    run = implementation("state_update", x, state, dt, A, B, C, D, z, dt_bias)
    return run(state, x, dt, A, B, C, D, z, dt_bias, softplus)


@fake("state_update")
def _(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator("(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor")
def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One step of `causal_conv1d`.

    Parameters
    ----------
    state : Tensor
        (batch, channel, width): the last inputs, shifted in place so that it ends with `x`.
    x : Tensor
        (batch, channel).
    weight : Tensor
        (channel, width).
    bias : Tensor, optional
        (channel).
    silu : bool
        Whether SiLU follows.

    Returns
    -------
    Tensor
        (batch, channel).
    """
    return implementation("conv_update", x, state, weight, bias)(state, x, weight, bias, silu)


@fake("conv_update")
def _(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


for _name, _backward, _setup in (
    ("gather", _gather_backward, _gather_setup),
    ("scatter", _scatter_backward, _scatter_setup),
    ("restore", _restore_backward, _restore_setup),
    ("last_tokens", _last_backward, _last_setup),
    ("selective_scan", _scan_backward, _scan_setup),
    ("causal_conv1d", _conv_backward, _conv_setup),
    ("rms_norm", _norm_backward, _norm_setup),
    ("gated_norm", _gated_norm_backward, _gated_norm_setup),
):
    torch.library.register_autograd(f"simba::{_name}", _backward, setup_context=_setup, lib=LIBRARY)

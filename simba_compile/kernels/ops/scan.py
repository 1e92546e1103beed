"""The operators of Mamba-1's scan: the influence of its tokens, the scan with its gradient, one step of it."""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.ops.dispatch import expect_pool, fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable, undifferentiable
from simba_compile.kernels.reference import compute_dtype

SCAN_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool softplus"


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
    expect_pool(pool)
    return implementation("influence", x, dt, A, B, C, dt_bias)(x, dt, A, B, C, dt_bias, softplus, pool, bias_in_decay)


@fake("influence")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


undifferentiable("influence")


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
    x, dt : Tensor
        (batch, token, channel).
    A : Tensor
        (channel, state).
    B, C : Tensor
        (batch, token, state).
    D, dt_bias : Tensor, optional
        (channel).
    z : Tensor, optional
        (batch, kept, channel): the gate, of the tokens that the scan runs over.
    softplus : bool
        Whether Δ goes through softplus.
    index : Tensor, optional
        (batch, kept) int64, no position twice: the tokens that the scan runs over, in this order. All of them unless given.

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
    return x.new_empty((x.shape[0], tokens_scanned(x, rest[-1]), x.shape[2])), state


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
    """The gradients of `selective_scan` over all its tokens.

    Parameters
    ----------
    grad : Tensor
        (batch, token, channel): that of the output, in x's dtype.
    grad_state : Tensor, optional
        (batch, channel, state): that of the last state.
    x, dt, A, B, C, D, z, dt_bias, softplus
        See `selective_scan`.

    Returns
    -------
    tuple of Tensor
        Those of x, dt, A, B, C, D, z and dt_bias, in this order, shaped like them; that of a missing input is empty. Those
        of A, D and dt_bias come in float32 (float64 for float64), the others in x's dtype.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    return implementation("selective_scan_backward", grad, grad_state, *inputs)(grad, grad_state, *inputs, softplus)


@fake("selective_scan_backward")
def _(grad: Tensor, grad_state: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kind = compute_dtype(x.dtype)
    return empty_gradients((x, *rest[:7]), (x.dtype, x.dtype, kind, x.dtype, x.dtype, kind, x.dtype, kind))


undifferentiable("selective_scan_backward")


def empty_gradients(inputs: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """The shapes of a scan's gradients: those of its inputs, and of size 0 for a missing one."""
    x = inputs[0]
    return tuple(
        x.new_empty(0 if value is None else value.shape, dtype=dtype) for value, dtype in zip(inputs, dtypes, strict=True)
    )


def _scan_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, index = inputs
    ctx.save_for_backward(*tensors, index)


def tokens_scanned(x: Tensor, index: Tensor | None) -> int:
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


def _scan_backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple:
    *inputs, index = ctx.saved_tensors
    x, dt, A, B, C, D, z, dt_bias = inputs
    u, step, b, c = kept_of([x, dt, B, C], index)
    grads = torch.ops.simba.selective_scan_backward(grad, grad_state, u, step, A, b, c, D, z, dt_bias, ctx.softplus)
    return *gradients_of(inputs, grads, index, (0, 1, 3, 4)), None, None


differentiable("selective_scan", _scan_backward, _scan_setup)


@operator(f"(Tensor(a!) state, {SCAN_INPUTS}, bool log_of_A=False) -> Tensor")
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
    log_of_A: bool = False,
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
    log_of_A : bool, optional
        Whether A is given as ``log(-A)``, as models keep it.

    Returns
    -------
    Tensor
        (batch, channel).
    """
    run = implementation("state_update", x, state, dt, A, B, C, D, z, dt_bias)
    return run(state, x, dt, A, B, C, D, z, dt_bias, softplus, log_of_A)


@fake("state_update")
def _(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


undifferentiable("state_update")

"""The operators of Mamba-2 (SSD: A is one number for each head).

``x`` is (batch, token, head, p): a head has p channels, each with a state of n numbers. Heads share B and C in groups: head
h reads those of group ``h // (heads / groups)``.
"""

from typing import Any

import torch
from torch import Tensor

from simba_compile.kernels.ops.dispatch import expect_pool, fake, implementation, operator
from simba_compile.kernels.ops.gradients import differentiable, undifferentiable
from simba_compile.kernels.ops.scan import empty_gradients, gradients_of, kept_of, tokens_scanned
from simba_compile.kernels.reference import compute_dtype

SSD_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C"
STEP = "Tensor? dt_bias, bool softplus, float dt_min, float dt_max"


@operator(f"({SSD_INPUTS}, {STEP}, str pool, bool bias_in_decay) -> Tensor")
def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    pool: str,
    bias_in_decay: bool,
) -> Tensor:
    """The logarithm of each token's influence on the last output of an SSD scan.

    ``Δy_T(t)[h, p] = x_t[h, p] Δ_t[h] (C_T · B_t) exp(A_h S_t[h])`` with ``S_t = Σ_{k>t} Δ_k`` (arXiv 2505.20698, equation
    4, with the A of Mamba-2), pooled over the heads h and their channels p.

    Parameters
    ----------
    x, dt, A, B, C, dt_bias, softplus, dt_min, dt_max
        See `ssd_scan`. Of C, only the last token's rows are read.
    pool, bias_in_decay
        See `simba_compile.kernels.ops.scan.influence`.

    Returns
    -------
    Tensor
        (batch, token) in float64. -inf for an influence of zero, NaN where an input is NaN. No gradient.
    """
    expect_pool(pool)
    run = implementation("ssd_influence", x, dt, A, B, C, dt_bias)
    return run(x, dt, A, B, C, dt_bias, softplus, dt_min, dt_max, pool, bias_in_decay)


@fake("ssd_influence")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64)


undifferentiable("ssd_influence")


@operator(f"({SSD_INPUTS}, Tensor? D, {STEP}, Tensor? initial, Tensor? index) -> (Tensor, Tensor)")
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    initial: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-2 over the kept tokens (Dao & Gu 2024, equation 2 with A = a I).

    ``h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t ⊗ B_t`` and ``y_t = h_t C_t + D x_t`` with
    ``Δ = clamp(softplus(dt + dt_bias), dt_min, dt_max)``.

    Parameters
    ----------
    x : Tensor
        (batch, token, head, p).
    dt : Tensor
        (batch, token, head).
    A : Tensor
        (head).
    B, C : Tensor
        (batch, token, group, n).
    D, dt_bias : Tensor, optional
        (head).
    softplus : bool
        Whether Δ goes through softplus.
    dt_min, dt_max : float
        Where Δ is cut off.
    initial : Tensor, optional
        (batch, head, p, n): the state before the first token; zero unless given.
    index : Tensor, optional
        (batch, kept) int64, no position twice: the tokens that the scan runs over, in this order. All of them unless given.

    Returns
    -------
    Tensor
        (batch, kept, head, p) in float32 (float64 for float64), as Hugging Face's own scan returns it.
    Tensor
        (batch, head, p, n): the last state, in the same type.
    """
    run = implementation("ssd_scan", x, dt, A, B, C, D, dt_bias, initial, index)
    return run(x, dt, A, B, C, D, dt_bias, softplus, dt_min, dt_max, initial, index)


@fake("ssd_scan")
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind = compute_dtype(x.dtype)
    y = x.new_empty((x.shape[0], tokens_scanned(x, rest[-1]), *x.shape[2:]), dtype=kind)
    return y, x.new_empty((x.shape[0], *x.shape[2:], B.shape[3]), dtype=kind)


@operator(
    f"(Tensor grad, Tensor? grad_state, {SSD_INPUTS}, Tensor? D, {STEP}, Tensor? initial)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def ssd_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    initial: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of `ssd_scan` over all its tokens.

    Parameters
    ----------
    grad : Tensor
        (batch, token, head, p): that of the output.
    grad_state : Tensor, optional
        (batch, head, p, n): that of the last state.
    x, dt, A, B, C, D, dt_bias, softplus, dt_min, dt_max, initial
        See `ssd_scan`.

    Returns
    -------
    tuple of Tensor
        Those of x, dt, A, B, C, D, dt_bias and initial, in this order, shaped like them; that of a missing input is empty.
        Those of A, D, dt_bias and initial come in float32 (float64 for float64), the others in their input's dtype.
    """
    run = implementation("ssd_scan_backward", grad, grad_state, x, dt, A, B, C, D, dt_bias, initial)
    return run(grad, grad_state, x, dt, A, B, C, D, dt_bias, softplus, dt_min, dt_max, initial)


@fake("ssd_scan_backward")
def _(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    initial: Tensor | None,
) -> tuple[Tensor, ...]:
    kind = compute_dtype(x.dtype)
    dtypes = (x.dtype, dt.dtype, kind, B.dtype, C.dtype, kind, kind, kind)
    return empty_gradients((x, dt, A, B, C, D, dt_bias, initial), dtypes)


undifferentiable("ssd_scan_backward")


def _ssd_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, ctx.dt_min, ctx.dt_max, initial, index = inputs
    if initial is not None:
        initial = initial.clone()  # a cache's own, into which the new state is written
    ctx.save_for_backward(*tensors, initial, index)


def _ssd_backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple:
    *inputs, initial, index = ctx.saved_tensors
    x, dt, A, B, C, D, dt_bias = inputs
    u, step, b, c = kept_of([x, dt, B, C], index)
    *grads, dinitial = torch.ops.simba.ssd_scan_backward(
        grad, grad_state, u, step, A, b, c, D, dt_bias, ctx.softplus, ctx.dt_min, ctx.dt_max, initial
    )
    found = gradients_of(inputs, grads, index, (0, 1, 3, 4))
    return *found, None, None, None, None if initial is None else dinitial.to(initial.dtype), None


differentiable("ssd_scan", _ssd_backward, _ssd_setup)


@operator(f"(Tensor(a!) state, {SSD_INPUTS}, Tensor? D, Tensor? dt_bias, bool softplus, bool log_of_A=False) -> Tensor")
def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    log_of_A: bool = False,
) -> Tensor:
    """One step of `ssd_scan`. Its Δ has no limits: Hugging Face's own step has none.

    Parameters
    ----------
    state : Tensor
        (batch, head, p, n), updated in place.
    x : Tensor
        (batch, head, p).
    dt : Tensor
        (batch, head).
    A : Tensor
        (head).
    B, C : Tensor
        (batch, group, n).
    D, dt_bias : Tensor, optional
        (head).
    softplus : bool
        Whether Δ goes through softplus.
    log_of_A : bool, optional
        Whether A is given as ``log(-A)``, as models keep it.

    Returns
    -------
    Tensor
        (batch, head, p) in x's dtype.
    """
    run = implementation("ssd_state_update", x, state, dt, A, B, C, D, dt_bias)
    return run(state, x, dt, A, B, C, D, dt_bias, softplus, log_of_A)


@fake("ssd_state_update")
def _(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


undifferentiable("ssd_state_update")

"""Mamba-2's scan: the influence of its tokens, the scan with its gradient, one step of it."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.dtypes import compute_dtype
from simba_compile.kernels.reference.scan import later, step_size
from simba_compile.kernels.reference.tokens import gather


def ssd_step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool, limits: tuple[float, float]) -> Tensor:
    """`step_size`, held within `limits` as Mamba-2 does."""
    return step_size(dt, dt_bias, softplus).clamp(*limits)


def _of_heads(groups: Tensor, heads: int) -> Tensor:
    """B or C for each head, (…, head, state), from those of its group, (…, group, state)."""
    return groups.repeat_interleave(heads // groups.shape[-2], -2)


def ssd_states(delta: Tensor, u: Tensor, A: Tensor, B: Tensor, initial: Tensor | None = None) -> Iterator[Tensor]:
    """`scan_states` of Mamba-2: (batch, head, p, state)."""
    b = _of_heads(B, u.shape[2])
    state = u.new_zeros(u.shape[0], *u.shape[2:], b.shape[-1]) if initial is None else initial.to(u.dtype)
    yield state
    decay, step = torch.exp(delta * A)[..., None, None], (delta[..., None] * u)[..., None]
    for t in range(u.shape[1]):
        state = decay[:, t] * state + step[:, t] * b[:, t, :, None]
        yield state


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    initial: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.ssd.ssd_scan`."""
    if index is not None:
        x, dt, B, C = (gather(value, index) for value in (x, dt, B, C))
    delta = ssd_step_size(dt, dt_bias, softplus, (dt_min, dt_max))
    u, A, B, C = (value.to(delta.dtype) for value in (x, A, B, C))
    c = _of_heads(C, u.shape[2])
    states = ssd_states(delta, u, A, B, initial)
    state, outputs = next(states), []
    for t, state in enumerate(states):
        outputs.append((state * c[:, t, :, None]).sum(-1))
    if not outputs:
        state = state.clone()  # not the initial one itself
    y = torch.stack(outputs, 1) if outputs else u.clone()
    return (y if D is None else y + u * D.to(u.dtype)[:, None]), state


def ssd_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    initial: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `simba_compile.kernels.ops.ssd.ssd_scan_backward`. The adjoint recurrence, token by token."""
    raw = step_size(dt, dt_bias, False)
    free = F.softplus(raw) if softplus else raw
    delta = free.clamp(dt_min, dt_max)
    kind, heads, tokens = delta.dtype, x.shape[2], x.shape[1]
    u, g, a = x.to(kind), grad.to(kind), A.to(kind)
    b, c = (_of_heads(value.to(kind), heads) for value in (B, C))
    decay, step = torch.exp(delta * a)[..., None, None], delta[..., None] * u
    states = list(ssd_states(delta, u, a, B.to(kind), initial))
    adjoint = torch.zeros_like(states[0]) if grad_state is None else grad_state.to(kind)
    dstep, db, dc, dlog = torch.zeros_like(u), torch.zeros_like(b), torch.zeros_like(c), torch.zeros_like(delta)
    for t in reversed(range(tokens)):
        adjoint = adjoint + g[:, t, :, :, None] * c[:, t, :, None]
        dc[:, t] = (g[:, t, :, :, None] * states[t + 1]).sum(2)
        dstep[:, t] = (adjoint * b[:, t, :, None]).sum(-1)
        db[:, t] = (adjoint * step[:, t, :, :, None]).sum(2)
        adjoint = adjoint * decay[:, t]
        dlog[:, t] = (adjoint * states[t]).sum((-2, -1))  # for Δ A, the logarithm of the decay
    skip = 0 if D is None else g * D.to(kind)[:, None]
    ddelta = dlog * a + (dstep * u).sum(-1)
    ddt = ddelta * ((free >= dt_min) & (free <= dt_max)) * (torch.sigmoid(raw) if softplus else 1)
    per_group = (*B.shape[:3], heads // B.shape[2], B.shape[3])
    return (
        (dstep * delta[..., None] + skip).to(x.dtype),
        ddt.to(dt.dtype),
        (dlog * delta).sum((0, 1)),
        db.view(per_group).sum(3).to(B.dtype),
        dc.view(per_group).sum(3).to(C.dtype),
        x.new_empty(0, dtype=kind) if D is None else (g * u).sum((0, 1, 3)),
        x.new_empty(0, dtype=kind) if dt_bias is None else ddt.sum((0, 1)),
        x.new_empty(0, dtype=kind) if initial is None else adjoint,
    )


def ssd_influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    pool: str = "max",
    bias_in_decay: bool = True,
) -> Tensor:
    """See `simba_compile.kernels.ops.ssd.ssd_influence`."""
    limits = (dt_min, dt_max)
    delta = ssd_step_size(dt, dt_bias, softplus, limits)
    decay = delta if bias_in_decay else ssd_step_size(dt, None, softplus, limits)
    product = (B.to(delta.dtype) * C[:, -1:].to(delta.dtype)).sum(-1, keepdim=True)
    weight = delta * _of_heads(product, x.shape[2])[..., 0]
    value = x.to(delta.dtype) * weight[..., None]
    if pool == "max":
        value = torch.where(value < 0, 0, value)
    shift = A.double() * later(decay.double())
    score = (shift[..., None] + value.abs().double().log()).flatten(2)
    if pool == "l2":
        return torch.logsumexp(2 * score, -1) / 2
    return score.amax(-1)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    log_of_A: bool = False,
) -> Tensor:
    """See `simba_compile.kernels.ops.ssd.ssd_state_update`."""
    if log_of_A:
        A = -torch.exp(A.to(compute_dtype(x.dtype)))
    one, step, b, c = (value[:, None] for value in (x, dt, B, C))  # a sequence of one token
    y, new = ssd_scan(one, step, A, b, c, D, dt_bias, softplus, -math.inf, math.inf, state)
    state.copy_(new)
    return y[:, 0].to(x.dtype)

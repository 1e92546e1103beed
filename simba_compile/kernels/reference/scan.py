"""Mamba-1's scan: the influence of its tokens, the scan with its gradient, one step of it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.dtypes import compute_dtype
from simba_compile.kernels.reference.tokens import gather

POOLS = ("max", "absmax", "l2")  # in the order of cpu/simba.h, which is given the place


def step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ = softplus(dt + dt_bias), in the compute type; without softplus, the sum itself."""
    delta = dt.to(compute_dtype(dt.dtype))
    if dt_bias is not None:
        delta = delta + dt_bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def scan_states(delta: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Iterator[Tensor]:
    """The scan's state before the first token, and after each one: (batch, channel, state)."""
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    yield state
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        yield state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.scan.selective_scan`."""
    if index is not None:
        x, dt, B, C = (gather(value, index) for value in (x, dt, B, C))
    delta = step_size(dt, dt_bias, softplus)
    u, A, B, C = (value.to(delta.dtype) for value in (x, A, B, C))
    states = scan_states(delta, u, A, B)
    state, outputs = next(states), []
    for t, state in enumerate(states):
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.clone()
    if D is not None:
        y = y + u * D.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), state


def selective_scan_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
) -> tuple[Tensor, ...]:
    """See `simba_compile.kernels.ops.scan.selective_scan_backward`. The adjoint recurrence, token by token."""
    delta = step_size(dt, dt_bias, softplus)
    kind = delta.dtype
    u, g, a, b, c = (value.to(kind) for value in (x, grad, A, B, C))
    skip = u.new_zeros(u.shape[2]) if D is None else D.to(kind)
    tokens = u.shape[1]
    states = list(scan_states(delta, u, a, b))
    dz = None
    if z is not None:
        gate = z.to(kind)
        y = u * skip
        y = y + torch.stack([(states[t + 1] * c[:, t, None, :]).sum(-1) for t in range(tokens)], 1)
        sigmoid = torch.sigmoid(gate)
        dz = g * y * (sigmoid + gate * sigmoid * (1 - sigmoid))
        g = g * gate * sigmoid
    dx, ddelta, dB, dC = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(b), torch.zeros_like(c)
    dA = torch.zeros_like(a)
    adjoint = torch.zeros_like(states[0]) if grad_state is None else grad_state.to(kind)
    for t in reversed(range(tokens)):
        decay, now = torch.exp(delta[:, t, :, None] * a), delta[:, t]
        adjoint = adjoint + g[:, t, :, None] * c[:, t, None, :]
        dC[:, t] = (g[:, t, :, None] * states[t + 1]).sum(1)
        dB[:, t] = (adjoint * (now * u[:, t])[:, :, None]).sum(1)
        from_B = (adjoint * b[:, t, None, :]).sum(-1)
        adjoint = adjoint * decay
        through = adjoint * states[t]
        dA += (through * now[:, :, None]).sum(0)
        dx[:, t] = now * from_B + g[:, t] * skip
        ddelta[:, t] = u[:, t] * from_B + (through * a).sum(-1)
    if softplus:
        raw = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias.to(kind)
        ddelta = ddelta * torch.sigmoid(raw)
    return (
        *(value.to(x.dtype) for value in (dx, ddelta)),
        dA,
        *(value.to(x.dtype) for value in (dB, dC)),
        x.new_empty(0, dtype=kind) if D is None else (g * u).sum((0, 1)),
        x.new_empty(0) if dz is None else dz.to(x.dtype),
        x.new_empty(0, dtype=kind) if dt_bias is None else ddelta.sum((0, 1)),
    )


def later(steps: Tensor) -> Tensor:
    """S_t = Σ_{k>t} of the steps."""
    return F.pad(steps.flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1))


def influence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    pool: str = "max",
    bias_in_decay: bool = True,
) -> Tensor:
    """See `simba_compile.kernels.ops.scan.influence`."""
    delta = step_size(dt, dt_bias, softplus)
    decay = (delta if bias_in_decay else step_size(dt, None, softplus)).double()
    x, A, weight = x.to(delta.dtype), A.to(delta.dtype), B.to(delta.dtype) * C[:, -1:].to(delta.dtype)
    S = later(decay)
    high, low = A.amax(1), A.amin(1)
    shift = torch.where(S < 0, S * low, S * high)  # max_n A S
    total = torch.zeros_like(delta)
    for n in range(A.shape[1]):  # one state at a time: (batch, token, channel, state) would not fit
        lead = torch.where(S < 0, (A[:, n] - low) * S, (A[:, n] - high) * S)
        total = total + weight[:, :, None, n] * lead.to(delta.dtype).exp()
    value = x * delta * total
    if pool == "max":
        value = torch.where(value < 0, 0, value)
    score = shift.double() + value.abs().double().log()
    if pool == "l2":
        return torch.logsumexp(2 * score, -1) / 2
    return score.amax(-1)


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    log_of_A: bool = False,
) -> Tensor:
    """See `simba_compile.kernels.ops.scan.state_update`."""
    delta = step_size(dt, dt_bias, softplus)
    u, A, B, C = (value.to(delta.dtype) for value in (x, A, B, C))
    if log_of_A:
        A = -torch.exp(A)
    new = torch.exp(delta[..., None] * A) * state.to(delta.dtype) + (delta * u)[..., None] * B[:, None]
    state.copy_(new)
    y = (new * C[:, None]).sum(-1)
    if D is not None:
        y = y + u * D.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)

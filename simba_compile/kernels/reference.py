"""Every operator that computes something, in plain torch: the definition that the kernels are tested against.

Written to be read. Correct for any floating dtype and any strides, and differentiable. Half types are widened to float32
inside, as the kernels do. Channels are last throughout: ``x`` is (batch, token, channel).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

POOLS = ("max", "absmax", "l2")
CRITERIA = ("recent", "uniform", "random")  # that do not look at the tokens


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that a kernel computes in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ = softplus(dt + dt_bias), in the compute type; without softplus, the sum itself."""
    delta = dt.to(compute_dtype(dt.dtype))
    if dt_bias is not None:
        delta = delta + dt_bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.linear.linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    if add is None:
        return F.linear(x, weight, bias).contiguous()
    add = add if index is None else gather(add, index)
    product = torch.addmm(add.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]), weight.t()).view(add.shape)
    return product if bias is None else product + bias


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


def _later(steps: Tensor) -> Tensor:
    """S_t = Σ_{k>t} of the steps."""
    return F.pad(steps.flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1))


def contributions(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_last: Tensor, delta_decay: Tensor | None = None
) -> Tensor:
    """Δy_T(t): each token's part in the last output, channel by channel (the paper's equation 4).

    Parameters
    ----------
    x, delta : Tensor
        (batch, token, channel): the scan's input and its step sizes.
    A : Tensor
        (channel, state).
    B : Tensor
        (batch, token, state).
    C_last : Tensor
        (batch, state): C at the last token.
    delta_decay : Tensor, optional
        The step sizes that decay sums up; `delta` unless given.

    Returns
    -------
    Tensor
        (batch, token, channel). Its sum over tokens is y_T without skip and gate.
    """
    decay = delta if delta_decay is None else delta_decay
    S = _later(decay)
    terms = torch.exp(S[..., None] * A) * (B * C_last[:, None])[:, :, None, :]
    return x * delta * terms.sum(-1)


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
    S = _later(decay)
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


def gather(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.gather`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    sizes = list(x.shape)
    sizes[0], sizes[dim] = index.shape
    return x.expand([sizes[0], *x.shape[1:]]).gather(dim, index.view(shape).expand(sizes))


def scatter(full: Tensor, index: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.scatter`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return full.scatter(dim, index.view(shape).expand(x.shape), x)


def pool_heads(a: Tensor, b: Tensor, pool: str) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.pool_heads`."""
    return torch.logaddexp(2 * a, 2 * b) / 2 if pool == "l2" else torch.maximum(a, b)


def restore(base: Tensor, values: list[Tensor], positions: list[Tensor]) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.restore`."""
    full = base.to(values[-1].dtype, copy=True)
    for value, index in zip(values, positions, strict=True):
        full.scatter_(1, index[:, :, None].expand(value.shape), value.to(full.dtype))
    return full


_MARKS = {  # a NaN that no arithmetic makes, as the integer of its bits
    torch.float64: (torch.int64, 0x7FF8_51B4_0000_0000),
    torch.float32: (torch.int32, 0x7FC5_1B40),
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


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_k weight_k x_{t − width + 1 + k} + bias, in the compute type."""
    kind, tokens, width = compute_dtype(x.dtype), x.shape[1], weight.shape[1]
    before = F.pad(x.to(kind), (0, 0, width - 1, 0))
    y = torch.stack([before[:, k : k + tokens] * weight[:, k].to(kind) for k in range(width)]).sum(0)
    return y if bias is None else y + bias.to(kind)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """See `simba_compile.kernels.ops.conv.causal_conv1d`."""
    y = _convolution(x, weight, bias)
    return (F.silu(y) if silu else y).to(x.dtype)


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See `simba_compile.kernels.ops.conv.causal_conv1d_backward`."""
    kind, tokens, width = compute_dtype(x.dtype), x.shape[1], weight.shape[1]
    g = grad.to(kind)
    if silu:
        y = _convolution(x, weight, bias)
        sigmoid = torch.sigmoid(y)
        g = g * (sigmoid + y * sigmoid * (1 - sigmoid))
    before, after = F.pad(x.to(kind), (0, 0, width - 1, 0)), F.pad(g, (0, 0, 0, width - 1))
    dx = torch.zeros_like(g)
    for k in range(width):  # x_t is read with weight k by the output width - 1 - k tokens later
        dx = dx + after[:, width - 1 - k : width - 1 - k + tokens] * weight[:, k].to(kind)
    dweight = torch.stack([(g * before[:, k : k + tokens]).sum((0, 1)) for k in range(width)], 1)
    dbias = x.new_empty(0, dtype=kind) if bias is None else g.sum((0, 1))
    return dx.to(x.dtype), dweight, dbias


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


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """See `simba_compile.kernels.ops.conv.conv_update`."""
    kind = compute_dtype(x.dtype)
    state.copy_(torch.cat([state[..., 1:], x[..., None].to(state.dtype)], -1))
    y = (state.to(kind) * weight.to(kind)).sum(-1)
    if bias is not None:
        y = y + bias.to(kind)
    return (F.silu(y) if silu else y).to(x.dtype)


def mixer_update(
    state: Tensor,
    window: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
) -> Tensor:
    """See `simba_compile.kernels.ops.mixer.mixer_update`."""
    x, z = projected.reshape(-1, projected.shape[-1]).chunk(2, -1)
    u = conv_update(window, x, conv_weight, conv_bias)
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], state.shape[2], state.shape[2]], -1)
    y = state_update(state, u, F.linear(dt, dt_proj), A_log, B, C, D, z, dt_bias, log_of_A=True)
    return y.reshape(*projected.shape[:-1], y.shape[-1])


def ssd_mixer_update(
    state: Tensor,
    window: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    norm_groups: int,
) -> Tensor:
    """See `simba_compile.kernels.ops.mixer.ssd_mixer_update`."""
    heads, size, states = state.shape[1:]
    inner = heads * size
    gate, entering, dt = projected.reshape(-1, projected.shape[-1]).split([inner, window.shape[1], heads], -1)
    between = (window.shape[1] - inner) // 2
    x, B, C = conv_update(window, entering, conv_weight, conv_bias).split([inner, between, between], -1)
    B, C = B.unflatten(-1, (-1, states)), C.unflatten(-1, (-1, states))
    y = ssd_state_update(state, x.unflatten(-1, (heads, size)), dt, A_log, B, C, D, dt_bias, log_of_A=True).flatten(-2)
    if norm_groups:
        y = gated_norm(y, gate, norm_weight, eps, norm_groups)
    return y.reshape(*projected.shape[:-1], inner)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `simba_compile.kernels.ops.norm.rms_norm`."""
    kind = compute_dtype(x.dtype)
    u = x.to(kind)
    y = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(kind)).to(x.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.norm.gated_norm`."""
    kind = compute_dtype(x.dtype)
    grouped = (x.to(kind) * F.silu(gate.to(kind))).unflatten(-1, (groups, -1))
    y = (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    return (y if weight is None else y * weight.to(kind)).to(dtype or x.dtype)


def add_norm(
    residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.norm.add_norm`."""
    total = (residual if index is None else gather(residual, index)) + x
    return total, rms_norm(total.to(x.dtype), weight, eps)


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


def ssd_contributions(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_last: Tensor, delta_decay: Tensor | None = None
) -> Tensor:
    """`contributions` for Mamba-2, where A is one number for each head.

    Parameters
    ----------
    x : Tensor
        (batch, token, head, p).
    delta : Tensor
        (batch, token, head).
    A : Tensor
        (head).
    B : Tensor
        (batch, token, group, state).
    C_last : Tensor
        (batch, group, state): C at the last token.
    delta_decay : Tensor, optional
        The step sizes that decay sums up; `delta` unless given.

    Returns
    -------
    Tensor
        (batch, token, head, p). Its sum over tokens is y_T without the skip.
    """
    decay = torch.exp(_later(delta if delta_decay is None else delta_decay) * A)
    product = _of_heads((B * C_last[:, None]).sum(-1, keepdim=True), x.shape[2])[..., 0]
    return x * (delta * product * decay)[..., None]


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
    shift = A.double() * _later(decay.double())
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

"""The C kernels of Mamba-2 under ``cpu/``."""

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import (
    DTYPES,
    as_constant,
    bits,
    by_rows,
    call,
    expect,
    expect_on_cpu,
    pointer,
    view_of,
)
from simba_compile.kernels.reference import POOLS, compute_dtype

BLOCK = 8  # heads of a task: their states stay in the second-level cache, and they share a group's packed B and C


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """Sizes: batch, tokens, heads, channels of a head, groups, states."""
    if x.dim() != 4 or B.dim() != 4 or any(value.dtype not in DTYPES for value in (x, dt, B, C)):
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype}, dt {dt.dtype}, B {tuple(B.shape)}, {B.dtype} and C {C.dtype}; expected x "
            "(batch, token, head, channel) and B (batch, token, group, state) in float32, float64, bfloat16 or float16."
        )
    batch, tokens, heads, channels = x.shape
    groups, states = B.shape[2:]
    if groups < 1 or heads % groups or states < 1:
        raise ValueError(f"x has {heads} heads and B {groups} groups of {states} states; expected a multiple of the groups.")
    expect_on_cpu("x", x)
    expect("dt", dt, (batch, tokens, heads), None)
    expect("A", A, (heads,), None)
    expect("B", B, (batch, tokens, groups, states), None)
    expect("C", C, (batch, tokens, groups, states), None)
    expect("D", D, (heads,), None)
    expect("dt_bias", dt_bias, (heads,), None)
    return batch, tokens, heads, channels, groups, states


def _alike(*values: Tensor) -> tuple[Tensor, ...]:
    """Tensors that C reads together: of one dtype (widened where they differ), each with a last stride of 1."""
    if len({value.dtype for value in values}) > 1:
        wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
        values = tuple(value.to(wide) for value in values)
    return tuple(by_rows(value) for value in values)


def _view4(x: Tensor) -> tuple[int, int, int, int]:
    return (*view_of(x), x.stride(2))


def _block(batch: int, heads: int, groups: int) -> int:
    """Heads for one task: at most BLOCK, and as many tasks as keep all threads busy to the end."""
    threads = torch.get_num_threads()
    rounds = -(-batch * heads // (threads * BLOCK))
    return max(1, min(heads // groups, -(-batch * heads // (threads * max(rounds, 1)))))


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
    """See `simba_compile.kernels.ops.ssd.ssd_scan`."""
    batch, tokens, heads, channels, groups, states = _check(x, dt, A, B, C, D, dt_bias)
    expect("initial", initial, (batch, heads, channels, states), None)
    if index is not None:
        if index.dim() != 2:
            raise ValueError(f"index is {tuple(index.shape)}; expected (batch, kept).")
        expect("index", index, (batch, index.shape[1]), torch.int64)
        index = index.contiguous()
    kept = tokens if index is None else index.shape[1]
    x, dt, B, C = _alike(x, dt, B, C)
    kind = compute_dtype(x.dtype)
    A, D, dt_bias, initial = (as_constant(value, kind) for value in (A, D, dt_bias, initial))  # type: ignore[assignment]
    y = torch.empty(batch, kept, heads, channels, dtype=kind)
    state = torch.empty(batch, heads, channels, states, dtype=kind)
    if y.numel() == 0:
        return y, state.zero_() if initial is None else state.copy_(initial)
    words = [batch, tokens, kept, heads, channels, groups, states, softplus, _block(batch, heads, groups)]
    words += [bits(dt_min), bits(dt_max), *_view4(x), *view_of(dt), *_view4(B), *_view4(C)]
    words += [pointer(value) for value in (A, D, dt_bias, initial, index, y, state)]
    call("ssd_scan", x.dtype, words)
    return y, state


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
    """Gradients for x, dt, A, B, C, D, dt_bias and initial, in this order; empty where the input is missing."""
    batch, tokens, heads, channels, groups, states = _check(x, dt, A, B, C, D, dt_bias)
    shape = (batch, heads, channels, states)
    expect("grad", grad, tuple(x.shape), None)
    expect("grad_state", grad_state, shape, None)
    expect("initial", initial, shape, None)
    dtypes = [value.dtype for value in (x, dt, B, C)]
    x, dt, B, C = _alike(x, dt, B, C)
    kind = compute_dtype(x.dtype)
    A, D, dt_bias, initial = (as_constant(value, kind) for value in (A, D, dt_bias, initial))  # type: ignore[assignment]
    grad, grad_state = as_constant(grad, kind), as_constant(grad_state, kind)  # type: ignore[assignment]
    block = _block(batch, heads, groups)
    parts = -(-heads // groups // block)
    dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty(dt.shape, dtype=x.dtype)
    dA = torch.zeros(batch, heads, dtype=torch.float64)
    dD, dbias = (torch.zeros((batch, heads) if value is not None else (0, 0), dtype=torch.float64) for value in (D, dt_bias))
    dB, dC = (torch.zeros(batch, parts, tokens, groups, states, dtype=kind) for _ in range(2))
    dinitial = torch.empty(0 if initial is None else shape, dtype=kind)
    if x.numel():
        words = [batch, tokens, tokens, heads, channels, groups, states, softplus, block, bits(dt_min), bits(dt_max)]
        words += [*_view4(x), *view_of(dt), *_view4(B), *_view4(C)]
        words += [pointer(value) for value in (A, D, dt_bias, initial, None, grad, None, grad_state, dx, ddt)]
        words += [pointer(value) if value.numel() else 0 for value in (dA, dD, dbias, dB, dC, dinitial)]
        call("ssd_scan_backward", x.dtype, words)
    else:  # without channels there are still steps
        ddt.zero_()
        if initial is not None:
            dinitial.zero_() if grad_state is None else dinitial.copy_(grad_state)
    dB, dC = (value.sum(1) if parts > 1 else value[:, 0] for value in (dB, dC))
    dx, ddt, dB, dC = (value.to(dtype) for value, dtype in zip((dx, ddt, dB, dC), dtypes, strict=True))
    dA, dD, dbias = (value.sum(0).to(kind) for value in (dA, dD, dbias))
    return dx, ddt, dA, dB, dC, dD, dbias, dinitial


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
    """See `simba_compile.kernels.ops.ssd.ssd_influence`."""
    batch, tokens, heads, channels, groups, states = _check(x, dt, A, B, C, None, dt_bias)
    x, dt, B, C = _alike(x, dt, B, C)
    A, dt_bias = (as_constant(value, compute_dtype(x.dtype)) for value in (A, dt_bias))  # type: ignore[assignment]
    out = torch.full((batch, tokens), -torch.inf, dtype=torch.float64)
    if x.numel():
        words = [batch, tokens, heads, channels, groups, states, softplus, POOLS.index(pool), bias_in_decay]
        words += [bits(dt_min), bits(dt_max), *_view4(x), *view_of(dt), *_view4(B), *_view4(C)]
        call("ssd_influence", x.dtype, [*words, pointer(A), pointer(dt_bias), pointer(out)])
    return out


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
    """See `simba_compile.kernels.ops.ssd.ssd_state_update`."""
    batch, _, heads, channels, groups, states = _check(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, dt_bias)
    expect("state", state, (batch, heads, channels, states), None)
    dtype = x.dtype
    x, dt, B, C = _alike(x, dt, B, C)
    kind = compute_dtype(x.dtype)
    h: Tensor = as_constant(state, kind)  # type: ignore[assignment]
    A, D, dt_bias = (as_constant(value, kind) for value in (A, D, dt_bias))  # type: ignore[assignment]
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        words = [batch, heads, channels, groups, states, softplus, log_of_A, pointer(h)]
        words += [pointer(value) for value in (x, dt, B, C)]
        words += [x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1)]
        call("ssd_state_update", x.dtype, [*words, *(pointer(value) for value in (A, D, dt_bias, out))])
    if h is not state:
        state.copy_(h)
    return out.to(dtype)

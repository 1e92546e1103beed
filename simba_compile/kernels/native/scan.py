"""The C kernels of Mamba-1's scan, ``cpu/scan.h``, ``cpu/scan_backward.h``, ``cpu/influence.h`` and ``cpu/decode.h``."""

import torch
from torch import Tensor

from simba_compile.kernels.native.binding import (
    DTYPES,
    MISSING,
    ROW,
    ROWS,
    as_constant,
    by_rows,
    call,
    expect,
    expect_on_cpu,
    pointer,
    view_of,
)
from simba_compile.kernels.native.library import library
from simba_compile.kernels.reference import POOLS, compute_dtype

CHUNK = 16  # tokens between two state checkpoints; cpu/simba.h
MAX_STATES = 256  # cpu/level.h
SLICE = 24  # vectors of channels for one task: their states and their A stay in the second-level cache


def _check_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, axes: str
) -> None:
    if x.dim() != len(axes.split()) or A.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and A is {tuple(A.shape)}; expected x ({axes.replace(' ', ', ')}) in "
            "float32, float64, bfloat16 or float16 and A (channel, state)."
        )
    *rows, channels = x.shape
    states = A.shape[1]
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"A has {states} states; the native kernels take 1 to {MAX_STATES}.")
    expect_on_cpu("x", x)
    expect("dt", dt, (*rows, channels), x.dtype)
    expect("A", A, (channels, states), None)
    expect("B", B, (*rows, states), x.dtype)
    expect("C", C, (*rows, states), x.dtype)
    expect("D", D, (channels,), None)
    expect("dt_bias", dt_bias, (channels,), None)


def _slices(batch: int, channels: int) -> tuple[int, int]:
    """Channels of one task, tasks of one sequence."""
    lib = library()
    assert lib is not None
    lanes = lib.simba_lanes()
    blocks = -(-channels // lanes)
    vectors = max(1, min(SLICE, batch * blocks // torch.get_num_threads()))
    return vectors * lanes, max(1, -(-blocks // vectors))


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
    """See `simba_compile.kernels.ops.scan.selective_scan`."""
    _check_scan(x, dt, A, B, C, D, dt_bias, ROWS)
    batch, tokens, channels = x.shape
    if index is not None and index.dim() != 2:
        raise ValueError(f"index is {tuple(index.shape)}; expected (batch, kept).")
    kept = tokens if index is None else index.shape[1]
    if index is not None:
        expect("index", index, (batch, kept), torch.int64)
        index = index.contiguous()
    expect("z", z, (batch, kept, channels), x.dtype)
    kind = compute_dtype(x.dtype)
    x, dt, B, C = (by_rows(value) for value in (x, dt, B, C))
    z = None if z is None else by_rows(z)
    A, D, dt_bias = (as_constant(value, kind) for value in (A, D, dt_bias))  # type: ignore[assignment]
    out = torch.empty(batch, kept, channels, dtype=x.dtype)
    state = torch.empty(batch, channels, A.shape[1], dtype=kind)
    if batch == 0 or kept == 0 or channels == 0:
        return out, state.zero_()
    words = [batch, tokens, kept, channels, A.shape[1], softplus, _slices(batch, channels)[0]]
    for view in (x, dt, B, C, z):
        words += view_of(view)
    words += [pointer(A), pointer(D), pointer(dt_bias), pointer(index), *view_of(out), pointer(state), 0]
    call("selective_scan", x.dtype, words)
    return out, state


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
    """Gradients for x, dt, A, B, C, D, z, dt_bias, in this order; empty where the input is missing."""
    _check_scan(x, dt, A, B, C, D, dt_bias, ROWS)
    expect("grad", grad, tuple(x.shape), x.dtype)
    expect("z", z, tuple(x.shape), x.dtype)
    batch, tokens, channels = x.shape
    states, kind = A.shape[1], compute_dtype(x.dtype)
    expect("grad_state", grad_state, (batch, channels, states), None)
    x, dt, B, C, grad = (by_rows(value) for value in (x, dt, B, C, grad))
    z = None if z is None else by_rows(z)
    A, D, dt_bias, grad_state = (as_constant(value, kind) for value in (A, D, dt_bias, grad_state))  # type: ignore[assignment]
    size, slices = _slices(batch, channels)
    dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    dz = torch.empty(x.shape if z is not None else 0, dtype=x.dtype)
    dA = torch.zeros(batch, channels, states, dtype=kind)
    dD, dbias = (torch.zeros((batch, channels) if value is not None else (0, 0), dtype=kind) for value in (D, dt_bias))
    dB, dC = (torch.zeros(batch, slices, tokens, states, dtype=kind) for _ in range(2))
    checkpoints = torch.empty(batch, -(-tokens // CHUNK), slices * size, states, dtype=kind)
    if x.numel():
        words = [batch, tokens, tokens, channels, states, softplus, size]
        for view in (x, dt, B, C, z):
            words += view_of(view)
        words += [pointer(A), pointer(D), pointer(dt_bias), 0, *view_of(grad), 0, pointer(checkpoints)]
        words += [pointer(grad_state), *view_of(dx), *view_of(ddt), *(view_of(dz) if z is not None else MISSING)]
        words += [pointer(value) if value.numel() else 0 for value in (dA, dD, dbias, dB, dC)]
        call("selective_scan_backward", x.dtype, words)
    return dx, ddt, dA.sum(0), dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype), dD.sum(0), dz, dbias.sum(0)


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
    """See `simba_compile.kernels.ops.scan.influence`."""
    _check_scan(x, dt, A, B, C, None, dt_bias, ROWS)
    batch, tokens, channels = x.shape
    kind = compute_dtype(x.dtype)
    x, dt, B, C = (by_rows(value) for value in (x, dt, B, C))
    A, dt_bias = (as_constant(value, kind) for value in (A, dt_bias))  # type: ignore[assignment]
    size, slices = _slices(batch, channels)
    partial = torch.full((batch, slices, tokens), -torch.inf, dtype=torch.float64)
    if x.numel():
        words = [batch, tokens, channels, A.shape[1], softplus, size, POOLS.index(pool), bias_in_decay]
        for view in (x, dt, B, C):
            words += view_of(view)
        call("influence", x.dtype, [*words, pointer(A), pointer(dt_bias), pointer(partial)])
    return torch.logsumexp(2 * partial, 1) / 2 if pool == "l2" else partial.amax(1)


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
    """See `simba_compile.kernels.ops.scan.state_update`."""
    _check_scan(x, dt, A, B, C, D, dt_bias, ROW)
    expect("z", z, tuple(x.shape), x.dtype)
    batch, channels = x.shape
    kind = compute_dtype(x.dtype)
    expect("state", state, (batch, channels, A.shape[1]), None)
    h: Tensor = as_constant(state, kind)  # type: ignore[assignment]
    x, dt, B, C = (by_rows(value) for value in (x, dt, B, C))
    z = None if z is None else by_rows(z)
    A, D, dt_bias = (as_constant(value, kind) for value in (A, D, dt_bias))  # type: ignore[assignment]
    out = torch.empty(batch, channels, dtype=x.dtype)
    if x.numel():
        words = [batch, channels, A.shape[1], softplus, log_of_A, pointer(h)]
        words += [pointer(value) for value in (x, dt, B, C, z)]
        words += [0 if value is None else value.stride(0) for value in (x, dt, B, C, z)]
        call("state_update", x.dtype, [*words, pointer(A), pointer(D), pointer(dt_bias), pointer(out)])
    if h is not state:
        state.copy_(h)
    return out

"""The C kernel of a Mamba-1 mixer's step, ``cpu/decode.h``, called as `simba_compile.kernels.native` calls its own."""

import torch
from torch import Tensor

from simba_compile.kernels.native import (
    DTYPES,
    MAX_STATES,
    MAX_WIDTH,
    _call,
    _constant,
    _expect,
    _expect_on_cpu,
    _flat,
    _pointer,
    _rows,
)
from simba_compile.kernels.reference import compute_dtype


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
    dtype = projected.dtype
    if dtype not in DTYPES or state.dim() != 3 or window.dim() != 3 or dt_proj.dim() != 2 or projected.dim() < 1:
        raise ValueError(
            f"projected is {tuple(projected.shape)}, {dtype}, state {tuple(state.shape)}, window {tuple(window.shape)} and "
            f"dt_proj {tuple(dt_proj.shape)}; expected projected (..., 2 * channel) in float32, float64, bfloat16 or "
            "float16, state (batch, channel, state), window (batch, channel, width) and dt_proj (channel, rank)."
        )
    _expect_on_cpu("projected", projected)
    rows = _flat(projected)
    batch, channels, states = state.shape
    width, rank = window.shape[2], dt_proj.shape[1]
    if not 1 <= states <= MAX_STATES or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"state has {states} states and window a width of {width}; the native kernels take 1 to {MAX_STATES} states and "
            f"widths of 1 to {MAX_WIDTH}."
        )
    columns = rank + 2 * states
    kind = compute_dtype(dtype)
    _expect("projected", rows, (batch, 2 * channels), dtype)
    _expect("window", window, (batch, channels, width), None)
    _expect("state", state, (batch, channels, states), None)
    _expect("conv_weight", conv_weight, (channels, width), None)
    _expect("conv_bias", conv_bias, (channels,), None)
    _expect("x_proj", x_proj, (columns, channels), dtype)
    _expect("dt_proj", dt_proj, (channels, rank), dtype)
    _expect("dt_bias", dt_bias, (channels,), None)
    _expect("A_log", A_log, (channels, states), None)
    _expect("D", D, (channels,), None)
    out = torch.empty(*projected.shape[:-1], channels, dtype=dtype)
    if not out.numel():
        return out
    h: Tensor = _constant(state, kind)  # type: ignore[assignment]
    held: Tensor = _constant(window, dtype)  # type: ignore[assignment]
    x_proj, dt_proj = _rows(x_proj), _rows(dt_proj)
    conv_weight, conv_bias, dt_bias, A_log, D = (  # type: ignore[assignment]
        _constant(value, kind) for value in (conv_weight, conv_bias, dt_bias, A_log, D)
    )
    between = torch.empty(batch * (2 * channels + columns), dtype=dtype)
    size = dtype.itemsize
    u, row = between.data_ptr(), rows.stride(0)
    dt = u + size * batch * channels
    pieces = dt + size * batch * channels
    x, step, B, C = rows.data_ptr(), pieces, pieces + size * rank, pieces + size * (rank + states)
    unused = [0] * 5  # of a linear layer: bias, what is added, its strides, index
    words = [batch, channels, width, True, held.data_ptr(), x, row, conv_weight.data_ptr(), _pointer(conv_bias), u]
    words += [batch, batch, batch, channels, columns, u, x_proj.data_ptr(), channels, x_proj.stride(0), *unused, pieces]
    words += [batch, batch, batch, rank, channels, step, dt_proj.data_ptr(), columns, dt_proj.stride(0), *unused, dt]
    words += [batch, channels, states, True, True, h.data_ptr(), u, dt, B, C, x + size * channels]
    words += [channels, channels, columns, columns, row, A_log.data_ptr(), _pointer(D), _pointer(dt_bias), out.data_ptr()]
    _call("mixer_update", dtype, words)
    if held is not window:
        window.copy_(held)
    if h is not state:
        state.copy_(h)
    return out

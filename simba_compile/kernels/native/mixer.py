"""The C kernels of a mixer's step, ``cpu/decode.h``."""

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
    flat_rows,
    pointer,
)
from simba_compile.kernels.native.conv import MAX_WIDTH
from simba_compile.kernels.native.norm import MAX_GROUP
from simba_compile.kernels.native.scan import MAX_STATES
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
    expect_on_cpu("projected", projected)
    rows = flat_rows(projected)
    batch, channels, states = state.shape
    width, rank = window.shape[2], dt_proj.shape[1]
    if not 1 <= states <= MAX_STATES or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"state has {states} states and window a width of {width}; the native kernels take 1 to {MAX_STATES} states and "
            f"widths of 1 to {MAX_WIDTH}."
        )
    columns = rank + 2 * states
    kind = compute_dtype(dtype)
    expect("projected", rows, (batch, 2 * channels), dtype)
    expect("window", window, (batch, channels, width), None)
    expect("state", state, (batch, channels, states), None)
    expect("conv_weight", conv_weight, (channels, width), None)
    expect("conv_bias", conv_bias, (channels,), None)
    expect("x_proj", x_proj, (columns, channels), dtype)
    expect("dt_proj", dt_proj, (channels, rank), dtype)
    expect("dt_bias", dt_bias, (channels,), None)
    expect("A_log", A_log, (channels, states), None)
    expect("D", D, (channels,), None)
    out = torch.empty(*projected.shape[:-1], channels, dtype=dtype)
    if not out.numel():
        return out
    h: Tensor = as_constant(state, kind)  # type: ignore[assignment]
    held: Tensor = as_constant(window, dtype)  # type: ignore[assignment]
    x_proj, dt_proj = by_rows(x_proj), by_rows(dt_proj)
    conv_weight, conv_bias, dt_bias, A_log, D = (  # type: ignore[assignment]
        as_constant(value, kind) for value in (conv_weight, conv_bias, dt_bias, A_log, D)
    )
    scratch, each = torch.empty(batch * (2 * channels + columns), dtype=dtype), dtype.itemsize
    x, row_stride, u = rows.data_ptr(), rows.stride(0), scratch.data_ptr()
    z, dt = x + each * channels, u + each * batch * channels
    of_rank = dt + each * batch * channels  # of each sequence the rank of Δ, B and C
    B, C = of_rank + each * rank, of_rank + each * (rank + states)
    unused = [0] * 5  # of a linear layer: bias, what is added, its strides, index
    # The fields of MixerUpdateArgs (cpu/simba.h).
    conv = [batch, channels, width, True, held.data_ptr(), x, row_stride, conv_weight.data_ptr(), pointer(conv_bias), u]
    to_rank = [batch, batch, batch, channels, columns, u, x_proj.data_ptr(), channels, x_proj.stride(0), *unused, of_rank]
    to_dt = [batch, batch, batch, rank, channels, of_rank, dt_proj.data_ptr(), columns, dt_proj.stride(0), *unused, dt]
    read = [u, dt, B, C, z, channels, channels, columns, columns, row_stride]  # and the strides between sequences
    update = [batch, channels, states, True, True, h.data_ptr(), *read]
    update += [A_log.data_ptr(), pointer(D), pointer(dt_bias), out.data_ptr()]
    words = [*conv, *to_rank, *to_dt, *update]
    call("mixer_update", dtype, words)
    if held is not window:
        window.copy_(held)
    if h is not state:
        state.copy_(h)
    return out


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
    dtype = projected.dtype
    if dtype not in DTYPES or state.dim() != 4 or window.dim() != 3 or projected.dim() < 1:
        raise ValueError(
            f"projected is {tuple(projected.shape)}, {dtype}, state {tuple(state.shape)} and window {tuple(window.shape)}; "
            "expected projected (..., 2 * head * p + 2 * group * n + head) in float32, float64, bfloat16 or float16, state "
            "(batch, head, p, n) and window (batch, head * p + 2 * group * n, width)."
        )
    expect_on_cpu("projected", projected)
    rows = flat_rows(projected)
    batch, heads, size, states = state.shape
    inner, (mixed, width) = heads * size, window.shape[1:]
    groups = (mixed - inner) // (2 * states) if states else 0
    if groups < 1 or heads % groups or mixed != inner + 2 * groups * states or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"window is {tuple(window.shape)} beside a state of {heads} heads with {size} channels and {states} states; "
            f"expected head * p + 2 * group * n channels, where groups divide the heads, and a width of 1 to {MAX_WIDTH}."
        )
    if norm_groups < 0 or (norm_groups and (inner % norm_groups or inner // norm_groups > MAX_GROUP)):
        raise ValueError(
            f"norm_groups is {norm_groups}; expected 0 or a divisor of {inner} channels, with at most {MAX_GROUP} in each."
        )
    kind = compute_dtype(dtype)
    expect("projected", rows, (batch, inner + mixed + heads), dtype)
    expect("window", window, (batch, mixed, width), None)
    expect("state", state, (batch, heads, size, states), None)
    expect("conv_weight", conv_weight, (mixed, width), None)
    expect("conv_bias", conv_bias, (mixed,), None)
    expect("dt_bias", dt_bias, (heads,), None)
    expect("A_log", A_log, (heads,), None)
    expect("D", D, (heads,), None)
    expect("norm_weight", norm_weight, (inner,), None)
    out = torch.empty(*projected.shape[:-1], inner, dtype=dtype)
    if not out.numel():
        return out
    h: Tensor = as_constant(state, kind)  # type: ignore[assignment]
    held: Tensor = as_constant(window, dtype)  # type: ignore[assignment]
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = (  # type: ignore[assignment]
        as_constant(value, kind) for value in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    )
    scratch, each = torch.empty(batch * (mixed + inner), dtype=dtype), dtype.itemsize
    gate, row_stride, u = rows.data_ptr(), rows.stride(0), scratch.data_ptr()
    x, dt = gate + each * inner, gate + each * (inner + mixed)
    B, C = u + each * inner, u + each * (inner + groups * states)
    y = u + each * batch * mixed if norm_groups else out.data_ptr()
    # The fields of SsdMixerUpdateArgs (cpu/simba.h).
    conv = [batch, mixed, width, True, held.data_ptr(), x, row_stride, conv_weight.data_ptr(), pointer(conv_bias), u]
    update = [batch, heads, size, groups, states, True, True, h.data_ptr(), u, dt, B, C]
    update += [mixed, size, row_stride, mixed, states, mixed, states]  # strides
    update += [A_log.data_ptr(), pointer(D), pointer(dt_bias), y]
    norm = [batch if norm_groups else 0, inner, bits(eps), y, inner, pointer(norm_weight), out.data_ptr()]
    norm += [gate, row_stride, inner // max(norm_groups, 1), False, False]
    words = [*conv, *update, *norm]
    call("ssd_mixer_update", dtype, words)
    if held is not window:
        window.copy_(held)
    if h is not state:
        state.copy_(h)
    return out

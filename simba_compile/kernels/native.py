"""The C kernels under ``cpu/``, called through ctypes: those of Mamba-1, and what moves tokens.

Everything that C takes on trust is checked or arranged here: device, dtype, shape, and a stride of 1 along the last axis
(a tensor without it is copied). Where there is no library that fits, `available` is False and plain torch runs instead.
"""

import struct

import torch
from torch import Tensor

from simba_compile.kernels.library import library
from simba_compile.kernels.reference import POOLS, compute_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHUNK = 16  # tokens between two state checkpoints; cpu/simba.h
MAX_STATES = 256  # cpu/level.h
MAX_WIDTH = 64  # of a convolution; cpu/level.h
SLICE = 24  # vectors of channels for one task: their states and their A stay in the second-level cache
MISSING = (0, 0, 0)
ROWS, ROW = "batch token channel", "batch channel"  # the axes of a sequence, and of one token
OUT_OF_MEMORY, OUT_OF_RANGE = 1, 2  # cpu/simba.h


def available() -> bool:
    """Whether the native kernels can run."""
    return library() is not None


def _call(name: str, dtype: torch.dtype, words: list[int]) -> None:
    args = struct.pack(f"{len(words)}q", *words)  # half the time of an array of ctypes
    failure = getattr(library(), "simba_" + name)(args, DTYPES[dtype], torch.get_num_threads())
    if failure == OUT_OF_MEMORY:
        raise MemoryError(f"simba::{name} could not allocate its scratch memory.")
    if failure == OUT_OF_RANGE:
        raise IndexError(f"index holds positions outside 0..{words[1] - 1}.")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor | None) -> tuple[int, int, int]:
    return MISSING if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _bits(value: float) -> int:
    """A double as the 64-bit word that C reads it from."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter or a state in this type, contiguous: itself where it is so already."""
    return x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()


def _expect(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if value is None:
        return
    if not value.is_cpu or value.shape != shape or (dtype is not None and value.dtype != dtype):
        raise ValueError(
            f"{name} is {tuple(value.shape)}, {value.dtype}, on {value.device}; expected {shape}, {dtype or 'any dtype'}, "
            "on the CPU."
        )


def _expect_on_cpu(name: str, value: Tensor) -> None:
    if not value.is_cpu:
        _expect(name, value, tuple(value.shape), None)  # which it refuses


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
    _expect_on_cpu("x", x)
    _expect("dt", dt, (*rows, channels), x.dtype)
    _expect("A", A, (channels, states), None)
    _expect("B", B, (*rows, states), x.dtype)
    _expect("C", C, (*rows, states), x.dtype)
    _expect("D", D, (channels,), None)
    _expect("dt_bias", dt_bias, (channels,), None)


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
        _expect("index", index, (batch, kept), torch.int64)
        index = index.contiguous()
    _expect("z", z, (batch, kept, channels), x.dtype)
    kind = compute_dtype(x.dtype)
    x, dt, B, C = (_rows(value) for value in (x, dt, B, C))
    z = None if z is None else _rows(z)
    A, D, dt_bias = (_constant(value, kind) for value in (A, D, dt_bias))  # type: ignore[assignment]
    out = torch.empty(batch, kept, channels, dtype=x.dtype)
    state = torch.empty(batch, channels, A.shape[1], dtype=kind)
    if batch == 0 or kept == 0 or channels == 0:
        return out, state.zero_()
    words = [batch, tokens, kept, channels, A.shape[1], softplus, _slices(batch, channels)[0]]
    for view in (x, dt, B, C, z):
        words += _view(view)
    words += [_pointer(A), _pointer(D), _pointer(dt_bias), _pointer(index), *_view(out), _pointer(state), 0]
    _call("selective_scan", x.dtype, words)
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
    _expect("grad", grad, tuple(x.shape), x.dtype)
    _expect("z", z, tuple(x.shape), x.dtype)
    batch, tokens, channels = x.shape
    states, kind = A.shape[1], compute_dtype(x.dtype)
    _expect("grad_state", grad_state, (batch, channels, states), None)
    x, dt, B, C, grad = (_rows(value) for value in (x, dt, B, C, grad))
    z = None if z is None else _rows(z)
    A, D, dt_bias, grad_state = (_constant(value, kind) for value in (A, D, dt_bias, grad_state))  # type: ignore[assignment]
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
            words += _view(view)
        words += [_pointer(A), _pointer(D), _pointer(dt_bias), 0, *_view(grad), 0, _pointer(checkpoints)]
        words += [_pointer(grad_state), *_view(dx), *_view(ddt), *(_view(dz) if z is not None else MISSING)]
        words += [_pointer(value) if value.numel() else 0 for value in (dA, dD, dbias, dB, dC)]
        _call("selective_scan_backward", x.dtype, words)
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
    x, dt, B, C = (_rows(value) for value in (x, dt, B, C))
    A, dt_bias = (_constant(value, kind) for value in (A, dt_bias))  # type: ignore[assignment]
    size, slices = _slices(batch, channels)
    partial = torch.full((batch, slices, tokens), -torch.inf, dtype=torch.float64)
    if x.numel():
        words = [batch, tokens, channels, A.shape[1], softplus, size, POOLS.index(pool), bias_in_decay]
        for view in (x, dt, B, C):
            words += _view(view)
        _call("influence", x.dtype, [*words, _pointer(A), _pointer(dt_bias), _pointer(partial)])
    return torch.logsumexp(2 * partial, 1) / 2 if pool == "l2" else partial.amax(1)


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, axes: str) -> None:
    if x.dtype not in DTYPES or x.dim() != len(axes.split()) or weight.dim() != 2:
        raise ValueError(
            f"x is {tuple(x.shape)}, {x.dtype} and weight is {tuple(weight.shape)}; expected x ({axes.replace(' ', ', ')}) "
            "in float32, float64, bfloat16 or float16 and weight (channel, width)."
        )
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"weight has a width of {weight.shape[1]}; the native kernels take 1 to {MAX_WIDTH}.")
    _expect_on_cpu("x", x)
    _expect("weight", weight, (x.shape[-1], weight.shape[1]), None)
    _expect("bias", bias, (x.shape[-1],), None)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.causal_conv1d`."""
    _check_conv(x, weight, bias, ROWS)
    x, kind = _rows(x), compute_dtype(x.dtype)
    across, bias = weight.to(kind).t().contiguous(), _constant(bias, kind)
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.numel():
        words = [*x.shape, weight.shape[1], silu, *_view(x), _pointer(across), _pointer(bias), *_view(out)]
        _call("causal_conv1d", x.dtype, words)
    return out


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias; the last one empty where there is no bias."""
    _check_conv(x, weight, bias, ROWS)
    _expect("grad", grad, tuple(x.shape), x.dtype)
    x, grad, kind = _rows(x), _rows(grad), compute_dtype(x.dtype)
    across, fixed = weight.to(kind).t().contiguous(), _constant(bias, kind)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight, dbias = torch.zeros_like(across), torch.zeros(0 if bias is None else x.shape[2], dtype=kind)
    if x.numel():
        words = [*x.shape, weight.shape[1], silu, *_view(x), _pointer(across), _pointer(fixed), *_view(grad)]
        words += [*_view(dx), _pointer(dweight), _pointer(dbias) if bias is not None else 0]
        _call("causal_conv1d_backward", x.dtype, words)
    return dx, dweight.t().contiguous(), dbias


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
    _expect("z", z, tuple(x.shape), x.dtype)
    batch, channels = x.shape
    kind = compute_dtype(x.dtype)
    _expect("state", state, (batch, channels, A.shape[1]), None)
    h: Tensor = _constant(state, kind)  # type: ignore[assignment]
    x, dt, B, C = (_rows(value) for value in (x, dt, B, C))
    z = None if z is None else _rows(z)
    A, D, dt_bias = (_constant(value, kind) for value in (A, D, dt_bias))  # type: ignore[assignment]
    out = torch.empty(batch, channels, dtype=x.dtype)
    if x.numel():
        words = [batch, channels, A.shape[1], softplus, log_of_A, _pointer(h)]
        words += [_pointer(value) for value in (x, dt, B, C, z)]
        words += [0 if value is None else value.stride(0) for value in (x, dt, B, C, z)]
        _call("state_update", x.dtype, [*words, _pointer(A), _pointer(D), _pointer(dt_bias), _pointer(out)])
    if h is not state:
        state.copy_(h)
    return out


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See `simba_compile.kernels.ops.conv.conv_update`."""
    _check_conv(x, weight, bias, ROW)
    batch, channels = x.shape
    kind = compute_dtype(x.dtype)
    _expect("state", state, (batch, channels, weight.shape[1]), None)
    window: Tensor = _constant(state, x.dtype)  # type: ignore[assignment]
    x = _rows(x)
    weight, bias = _constant(weight, kind), _constant(bias, kind)  # type: ignore[assignment]
    out = torch.empty(batch, channels, dtype=x.dtype)
    if x.numel():
        words = [batch, channels, weight.shape[1], silu, _pointer(window), _pointer(x), x.stride(0)]
        _call("conv_update", x.dtype, [*words, _pointer(weight), _pointer(bias), _pointer(out)])
    if window is not state:
        state.copy_(window)
    return out


def _flat(x: Tensor) -> Tensor:
    """The rows of a tensor as (row, channel), without a copy where it can be."""
    rows = _rows(x)
    return rows if rows.dim() == 2 else rows.flatten(0, -2) if rows.dim() > 2 else rows[None]


def _stream(
    name: str, stream: Tensor, index: Tensor | None, shape: torch.Size, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, list[int], list[int]]:
    """A residual stream, or its tokens at an index, that something of this shape is added to, as C wants it.

    Returns memory, index, the numbers of its tokens and of kept ones, and the strides of batch and row.
    """
    if index is None:
        _expect(name, stream, tuple(shape), dtype)
        rows = _flat(stream)
        return rows, None, [rows.shape[0], rows.shape[0]], [0, rows.stride(0)]
    if len(shape) != 3 or stream.dim() != 3 or index.shape != shape[:2]:
        raise ValueError(
            f"index is {tuple(index.shape)}, {name} {tuple(stream.shape)} and what is added {tuple(shape)}; expected "
            f"an index (batch, kept), {name} (batch, token, channel) and (batch, kept, channel)."
        )
    tokens = stream.shape[1]
    _expect(name, stream, (shape[0], tokens, shape[2]), dtype)
    _expect("index", index, tuple(shape[:2]), torch.int64)
    rows = _rows(stream)
    return rows, index.contiguous(), [tokens, shape[1]], [rows.stride(0), rows.stride(1)]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.gather`: tokens in axis 1, everything behind them contiguous."""
    if x.dim() < 2 or index.dim() != 2 or (x.numel() and not x[0, 0].is_contiguous()):
        raise ValueError(
            f"x is {tuple(x.shape)} with strides {x.stride()} and index {tuple(index.shape)}; expected (batch, token, ...), "
            "contiguous behind the tokens, and (batch, kept)."
        )
    batch, tokens = x.shape[:2]
    kept = index.shape[1]
    _expect_on_cpu("x", x)
    _expect("index", index, (index.shape[0], kept), torch.int64)
    if batch not in (1, index.shape[0]):
        raise ValueError(f"x has {batch} sequences and index {index.shape[0]}.")
    index, size = index.contiguous(), x.element_size()
    out = torch.empty(index.shape[0], kept, *x.shape[2:], dtype=x.dtype)
    if out.numel():
        row = out[0, 0].numel() * size
        strides = [0 if batch == 1 else x.stride(0) * size, x.stride(1) * size]
        words = [index.shape[0], tokens, kept, row, *strides, _pointer(x), _pointer(index), _pointer(out)]
        _call("gather", torch.float32, words)  # bytes: of any type
    return out


def select(scores: Tensor, k: int, first: int, last: int) -> Tensor:
    """See `simba_compile.kernels.ops.tokens.select`."""
    if scores.dim() != 2 or min(first, last) < 0 or not first + last <= k <= scores.shape[1]:
        raise ValueError(
            f"scores is {tuple(scores.shape)}, k {k}, first {first}, last {last}; expected (batch, token) and "
            "first + last <= k <= tokens."
        )
    _expect_on_cpu("scores", scores)
    scores = scores.to(torch.float64).contiguous()
    out = torch.empty(scores.shape[0], k, dtype=torch.int64)
    if out.numel():
        _call("select", torch.float64, [*scores.shape, k, first, last, _pointer(scores), _pointer(out)])
    return out

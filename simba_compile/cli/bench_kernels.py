"""The operators by themselves, for ``simba bench --device cuda``: right, how fast, and beside whose kernels.

A case is made several times: small, and as wide as a large model, to be held against the definition in float64; so large
that offsets take more than 32 bits, where a sequence of a batch is held against the same one by itself; and at the sizes at
which it is timed.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simba_compile.cli.device import Device
from simba_compile.kernels import reference

SMALL = {"batch": 2, "tokens": 100, "channels": 96, "states": 16}
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPIES = 10  # in a run: waiting for one takes a few hundredths of it
LEAST = 1e-4  # what any result may be off, as a share of the largest number


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator.

    Parameters
    ----------
    operator : str
        Of ``torch.ops.simba``.
    args : tuple
        Its arguments.
    moved : int
        Bytes that it has to read and write, each once.
    peer : callable, optional
        The same by another package's kernel; raises ImportError where that is not installed.
    peer_name : str
        The package and its function.
    """

    operator: str
    args: tuple[Any, ...]
    moved: int
    peer: Callable[[], object] | None = None
    peer_name: str = ""

    def run(self) -> Any:
        """Call the operator."""
        return getattr(torch.ops.simba, self.operator)(*self.args)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in tensors if value is not None)


def _peer(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def _scan(batch: int, tokens: int, channels: int, states: int) -> tuple[Any, ...]:
    """x, dt, A, B, C, D, z, dt_bias as a mixer makes them: x and z are halves of one projection, and so are B and C.

    A grows with the state, as in Mamba: the score leaves out the last states, where they have faded in all channels.
    """
    x, z = torch.randn(batch, tokens, 2 * channels, dtype=torch.bfloat16).chunk(2, -1)
    dt, BC = torch.randn_like(x), torch.randn(batch, tokens, 2 * states, dtype=torch.bfloat16)
    A = -torch.arange(1.0, states + 1) * torch.empty(channels, 1).uniform_(0.8, 1.2)
    return x, dt, A, *BC.chunk(2, -1), torch.ones(channels), z, torch.full((channels,), -4.0)


def selective_scan(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The dense scan, with skip, gate and softplus."""
    x, dt, A, B, C, D, z, bias = inputs = _scan(batch, tokens, channels, states)
    across = [value.transpose(1, 2).contiguous() for value in (x, dt, B, C, z)]

    def peer() -> object:
        u, delta, b, c, gate = across
        run = _peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        return run(u, delta, A, b, c, D, gate, bias, delta_softplus=True, return_last_state=True)

    moved = size_of(*inputs) + size_of(x) + 4 * batch * channels * states
    return Case("selective_scan", (*inputs, True, None), moved, peer, "mamba-ssm selective_scan_fn")


def kept_scan(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The scan of a pruned layer, over half of the tokens."""
    (x, dt, A, B, C, D, z, bias), index = _scan(batch, tokens, channels, states), _half(batch, tokens)
    read, written = size_of(x, dt, B, C, z), size_of(x)
    moved = (read + written) // 2 + size_of(A, index) + 4 * batch * channels * states
    return Case("selective_scan", (x, dt, A, B, C, D, z[:, : index.shape[1]], bias, True, index), moved)


def selective_scan_backward(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The gradients of the scan."""
    inputs = _scan(batch, tokens, channels, states)
    grad, state = torch.randn_like(inputs[0]), torch.randn(batch, channels, states)
    return Case("selective_scan_backward", (grad, state, *inputs, True), 2 * size_of(*inputs) + size_of(grad, state))


def influence(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The score, pooled by its largest channel."""
    x, dt, A, B, C, _, _, bias = _scan(batch, tokens, channels, states)
    moved = size_of(x, dt, A, B, bias) + 8 * batch * tokens
    return Case("influence", (x, dt, A, B, C, bias, True, "max", True), moved)


def select(batch: int, tokens: int, channels: int, states: int) -> Case:
    """Half of the tokens."""
    scores = torch.randn(batch, tokens, dtype=torch.float64)
    return Case("select", (scores, tokens // 2, 0, 1), size_of(scores) + 8 * batch * (tokens // 2))


def gather(batch: int, tokens: int, channels: int, states: int) -> Case:
    """Half of the rows of a residual stream."""
    x = torch.randn(batch, tokens, channels // 2, dtype=torch.bfloat16)
    index = _half(batch, tokens)
    return Case("gather", (x, index, 1), 2 * size_of(x[:, : index.shape[1]]) + size_of(index))


def _half(batch: int, tokens: int) -> Tensor:
    """The positions of every other token."""
    return torch.arange(0, tokens - 1, 2).expand(batch, -1).contiguous()


def _filter(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution of four tokens."""
    return torch.randn(channels, 4, dtype=torch.bfloat16), torch.randn(channels, dtype=torch.bfloat16)


def causal_conv1d(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The convolution of four tokens with SiLU."""
    x = torch.randn(batch, tokens, 2 * channels, dtype=torch.bfloat16)[..., :channels]
    weight, bias = _filter(channels)

    def peer() -> object:
        return _peer("causal_conv1d", "causal_conv1d_fn")(x.transpose(1, 2), weight, bias, activation="silu")

    moved = 2 * size_of(x) + size_of(weight, bias)
    return Case("causal_conv1d", (x, weight, bias, True), moved, peer, "causal-conv1d causal_conv1d_fn")


def causal_conv1d_backward(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The gradients of the convolution."""
    x = torch.randn(batch, tokens, channels, dtype=torch.bfloat16)
    return Case("causal_conv1d_backward", (torch.randn_like(x), x, *_filter(channels), True), 3 * size_of(x))


def conv_update(batch: int, tokens: int, channels: int, states: int) -> Case:
    """One decoding step of the convolution."""
    window, x = torch.randn(batch, channels, 4, dtype=torch.bfloat16), torch.randn(batch, channels, dtype=torch.bfloat16)
    weight, bias = _filter(channels)
    return Case("conv_update", (window, x, weight, bias, True), 2 * size_of(window, x) + size_of(weight, bias))


def rms_norm(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The norm in front of a mixer."""
    x, weight = torch.randn(batch, tokens, channels // 2, dtype=torch.bfloat16), torch.randn(channels // 2)
    return Case("rms_norm", (x, weight, 1e-5), 2 * size_of(x) + size_of(weight))


def add_norm(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The residual stream of a model in halves, in float32: a mixer's output is added, and the sum normed."""
    x, weight = torch.randn(batch, tokens, channels // 2, dtype=torch.bfloat16), torch.randn(channels // 2)
    residual = torch.randn(x.shape)
    return Case("add_norm", (residual, x, weight, 1e-5, None), 2 * size_of(x, residual) + size_of(weight))


def state_update(batch: int, tokens: int, channels: int, states: int) -> Case:
    """One decoding step of the scan."""
    x, dt, A, B, C, D, z, bias = (value[:, -1] if value.dim() == 3 else value for value in _scan(batch, 2, channels, states))
    state = torch.randn(batch, channels, states)

    def peer() -> object:
        run = _peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
        return run(state, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)

    moved = 2 * size_of(state) + size_of(x, dt, A, B, C, D, z, bias) + size_of(x)
    return Case("state_update", (state, x, dt, A, B, C, D, z, bias, True), moved, peer, "mamba-ssm selective_state_update")


def mixer_update(batch: int, tokens: int, channels: int, states: int) -> Case:
    """One decoding step from in_proj to out_proj, with the two projections between."""
    rank = channels // 32  # as in Mamba, whose channels are twice as many as the residual stream's
    state, window = torch.randn(batch, channels, states), torch.randn(batch, channels, 4, dtype=torch.bfloat16)
    projected = torch.randn(batch, 1, 2 * channels, dtype=torch.bfloat16)
    weight, bias = _filter(channels)
    x_proj = torch.randn(rank + 2 * states, channels, dtype=torch.bfloat16) * channels**-0.5
    dt_proj = torch.randn(channels, rank, dtype=torch.bfloat16) * rank**-0.5
    A_log = torch.arange(1, states + 1).log().repeat(channels, 1)
    weights = (weight, bias, x_proj, dt_proj, torch.full((channels,), -4.0), A_log, torch.ones(channels))
    moved = 2 * size_of(state, window) + size_of(projected, *weights) + size_of(projected) // 2
    return Case("mixer_update", (state, window, projected, *weights), moved)


def _ssd(batch: int, tokens: int, channels: int) -> tuple[Any, ...]:
    """x, dt, A, B, C, D, dt_bias of Mamba-2: heads of 32 or 64 channels, one group of 128 states."""
    size = 64 if channels % 64 == 0 else 32
    heads = channels // size
    x, B, C = torch.randn(batch, tokens, channels + 256, dtype=torch.bfloat16).split([channels, 128, 128], -1)
    dt = torch.randn(batch, tokens, heads, dtype=torch.bfloat16)
    groups = (value.unflatten(-1, (1, 128)) for value in (B, C))
    A, bias = -torch.rand(heads) * 15 - 1, torch.full((heads,), -4.0)
    return x.unflatten(-1, (heads, size)), dt, A, *groups, torch.ones(heads), bias


def ssd_scan(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The scan of Mamba-2."""
    x, dt, A, B, C, D, bias = inputs = _ssd(batch, tokens, channels)

    def peer() -> object:
        run = _peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        return run(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True)

    moved = size_of(*inputs) + 4 * x.numel() + 4 * batch * channels * 128
    args = (x, dt, A, B, C, D, bias, True, 0.0, float("inf"), None, None)
    return Case("ssd_scan", args, moved, peer, "mamba-ssm mamba_chunk_scan_combined")


def ssd_scan_backward(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The gradients of Mamba-2's scan."""
    x, dt, A, B, C, D, bias = inputs = _ssd(batch, tokens, channels)
    grad, state = torch.randn(x.shape), torch.randn(batch, *x.shape[2:], 128)
    args = (grad, state, x, dt, A, B, C, D, bias, True, 0.0, float("inf"), None)
    return Case("ssd_scan_backward", args, 2 * size_of(*inputs) + size_of(grad, state))


def ssd_influence(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The score of Mamba-2."""
    x, dt, A, B, C, _, bias = _ssd(batch, tokens, channels)
    moved = size_of(x, dt, A, B, bias) + 8 * batch * tokens
    return Case("ssd_influence", (x, dt, A, B, C, bias, True, 0.0, float("inf"), "max", True), moved)


def ssd_state_update(batch: int, tokens: int, channels: int, states: int) -> Case:
    """One decoding step of Mamba-2."""
    x, dt, A, B, C, D, bias = (value[:, -1] if value.dim() >= 3 else value for value in _ssd(batch, 2, channels))
    state = torch.randn(*x.shape, 128)
    moved = 2 * size_of(state) + size_of(x, dt, A, B, C, D, bias) + size_of(x)
    return Case("ssd_state_update", (state, x, dt, A, B, C, D, bias, True), moved)


def ssd_mixer_update(batch: int, tokens: int, channels: int, states: int) -> Case:
    """One decoding step of Mamba-2 from in_proj to out_proj."""
    x, _, A, *_, D, dt_bias = (value[:, -1] if value.dim() >= 3 else value for value in _ssd(batch, 2, channels))
    heads, mixed = x.shape[1], channels + 256
    state, window = torch.randn(*x.shape, 128), torch.randn(batch, mixed, 4, dtype=torch.bfloat16)
    projected = torch.randn(batch, 1, channels + mixed + heads, dtype=torch.bfloat16)
    weights = (*_filter(mixed), dt_bias, (-A).log(), D, torch.ones(channels))
    moved = 2 * size_of(state, window) + size_of(projected, *weights) + size_of(x)
    return Case("ssd_mixer_update", (state, window, projected, *weights, 1e-5, 1), moved)


def gated_norm(batch: int, tokens: int, channels: int, states: int) -> Case:
    """The norm after the scan of Mamba-2."""
    x, gate = torch.randn(batch, tokens, channels), torch.randn(batch, tokens, channels, dtype=torch.bfloat16)
    weight = torch.randn(channels)
    return Case("gated_norm", (x, gate, weight, 1e-5, 1, torch.bfloat16), size_of(x, gate, gate, weight))


CASES: dict[str, Callable[..., Case]] = {
    maker.__name__: maker
    for maker in (
        selective_scan, kept_scan, influence, select, gather, causal_conv1d, rms_norm, add_norm,
        state_update, conv_update, mixer_update,
        ssd_scan, ssd_influence, ssd_state_update, ssd_mixer_update, gated_norm,
        selective_scan_backward, causal_conv1d_backward, ssd_scan_backward,
    )
}  # fmt: skip
OF_PROMPTS = (
    "selective_scan", "kept_scan", "influence", "gather", "causal_conv1d", "rms_norm", "add_norm",
    "ssd_scan", "ssd_influence", "gated_norm",
)  # fmt: skip
HALF_AS_WIDE = ("gather", "rms_norm", "add_norm")  # they work on the residual stream


def copy_bandwidth(device: Device, megabytes: int) -> float:
    """Bytes a second, read and written, of a copy within the device's memory: what a kernel can be held against."""
    with device.on():
        source = torch.empty(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    copies()
    return COPIES * 2 * size_of(source) / device.time(copies, 10, 2.0).median


def error(name: str, device: Device, dtype: str, shape: dict[str, int], runs: int = 1) -> float:
    """How far a case is off its definition in float64; what is updated in place counts as a result.

    `dtype` is what takes bfloat16's place. Infinite where runs differ: so a race between programs shows.
    """
    first: list[Tensor] = []
    for _ in range(runs):  # each on arguments of its own, laid out as they are made
        torch.manual_seed(0)
        with device.on():
            case = CASES[name](**shape)
        args = [_instead(value, TYPES[dtype]) for value in case.args]
        if not first:
            exact_args = [_exact(value) for value in args]
        result = dataclasses.replace(case, args=tuple(args)).run()
        made = [*_all(result), *_all(args)]
        first = first or made
        if not all(map(torch.equal, first, made)):
            return math.inf
    exact = getattr(reference, case.operator)(*exact_args)
    return off(list(zip(first, [*_all(exact), *_all(exact_args)], strict=True)), case.operator)


def _all(values: Any) -> list[Tensor]:
    """The tensors among results or arguments."""
    return [value for value in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(value, Tensor)]


def far_error(name: str, device: Device, shape: dict[str, int]) -> float:
    """How far the last sequence of a large batch is off what comes out for it alone, where offsets are small."""
    torch.manual_seed(0)
    with device.on():
        case = CASES[name](**shape)
    batch = shape["batch"]
    alone = [value[-1:] if isinstance(value, Tensor) and value.shape[0] == batch else value for value in case.args]
    one = dataclasses.replace(case, args=tuple(alone)).run()
    every = case.run()
    every = tuple(value[-1:] for value in every) if isinstance(every, tuple) else every[-1:]
    return off(list(zip(_all(every), _all(one), strict=True)), case.operator)


def off(pairs: list[tuple[Tensor, Tensor]], operator: str = "") -> float:
    """The largest difference, as a share of the largest number; infinite where one is not a number.

    Of scores, as a share of the largest influence; of positions, the share that differs.
    """
    worst = 0.0
    for one, other in pairs:
        other = other.to(one.device)
        if other.numel() == 0:
            continue
        if one.dtype == torch.int64:
            worst = max(worst, (one != other).double().mean().item())
            continue
        one, other = one.double(), other.double()
        if operator.endswith("influence") and other.dim() == 2:
            one, other = ((score - other.max()).exp() for score in (one, other))
        share = ((one - other).abs().max() / other.abs().max()).item()
        worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


def most(dtype: str) -> float:
    """How far a right result may be off: the factors of a product are rounded to the type, besides what comes of it."""
    return max(LEAST, 8 * torch.finfo(TYPES[dtype]).eps)


def _instead(value: Any, dtype: torch.dtype) -> Any:
    """An argument with another type in bfloat16's place."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.bfloat16 else value
    return dtype if value == torch.bfloat16 else value


def _exact(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.clone()


def measure(name: str, device: Device, shape: dict[str, int], runs: int) -> dict[str, Any]:
    """Time an operator and its peer at one shape, without what it takes to start them (`Device.time_on_it`).

    Returns
    -------
    dict
        "timing"; "bytes", that it has to move, and "rate", of them a second; with a peer, "peer" (its name) and either
        "peer_timing" or "peer_failed".
    """
    torch.manual_seed(0)
    with device.on():
        case = CASES[name](**shape)
    case.run()
    timing = device.time_on_it(case.run, runs, 2.0)
    result: dict[str, Any] = {"timing": timing.to_dict(), "bytes": case.moved, "rate": case.moved / timing.median}
    if case.peer is not None:
        result["peer"] = case.peer_name
        try:
            case.peer()
            result["peer_timing"] = device.time_on_it(case.peer, runs, 2.0).to_dict()
        except Exception as failure:
            result["peer_failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return result

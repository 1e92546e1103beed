"""Each operator at the size of mamba-130m's layer (mamba2-130m's), beside what plain torch does for the same result.

    pytest benchmarks/test_operators.py --benchmark-only

One group for each operator; the first row of a group is the faster one.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update

import simba_compile.kernels.ops  # noqa: F401  (registers torch.ops.simba)
from simba_compile.kernels import reference

TOKENS, KEPT, HIDDEN, CHANNELS, STATES, WIDTH, RANK = 2048, 1024, 768, 1536, 16, 4, 48
HEADS, HEAD, STATES_2, CHUNK = 24, 64, 128, 256  # of Mamba-2: heads, channels of each, their states, Hugging Face's chunks
OPS = torch.ops.simba

Call = Callable[[], object]


def rows(*shape: int) -> Tensor:
    return torch.randn(1, *shape)


def mixer_inputs(tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, z, dt_bias as a fresh Mamba has them: steps of 0.001 to 0.1, A from -1 to -16."""
    step = torch.empty(CHANNELS).uniform_(-6.9, -2.3).exp()
    return (
        rows(tokens, CHANNELS),
        rows(tokens, CHANNELS) * 0.1,
        -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1),
        rows(tokens, STATES),
        rows(tokens, STATES),
        torch.ones(CHANNELS),
        rows(tokens, CHANNELS),
        step + torch.log(-torch.expm1(-step)),
    )


def influence() -> dict[str, Call]:
    x, dt, A, B, C, _, _, dt_bias = mixer_inputs()
    return {
        "simba": lambda: OPS.influence(x, dt, A, B, C, dt_bias, True, "max", True),
        "torch": lambda: reference.influence(x, dt, A, B, C, dt_bias, True, "max", True),
    }


def selective_scan() -> dict[str, Call]:
    inputs = mixer_inputs()
    return {
        "simba": lambda: OPS.selective_scan(*inputs, True, None),
        "torch": lambda: reference.selective_scan(*inputs, True, None),
    }


def selective_scan_of_kept_tokens() -> dict[str, Call]:
    x, dt, A, B, C, D, z, dt_bias = mixer_inputs()
    index = torch.randperm(TOKENS)[:KEPT].sort().values[None]
    rest = D, z[:, :KEPT], dt_bias, True  # the gate is made for them alone

    def gathers_first() -> object:
        taken = [OPS.gather(value, index, 1) for value in (x, dt, B, C)]
        return OPS.selective_scan(*taken[:2], A, *taken[2:], *rest, None)

    return {"simba": lambda: OPS.selective_scan(x, dt, A, B, C, *rest, index), "simba, gathers first": gathers_first}


def causal_conv1d() -> dict[str, Call]:
    x, weight, bias = rows(TOKENS, CHANNELS), torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)
    across = x.transpose(1, 2).contiguous()  # as Hugging Face lays it out

    def plain() -> Tensor:
        return F.silu(F.conv1d(across, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)[..., :TOKENS])

    return {"simba": lambda: OPS.causal_conv1d(x, weight, bias, True), "torch": plain}


def linears(tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """in_proj and out_proj of eight layers, so that no weight is still in a cache when it is read."""
    inner, outer = rows(tokens, HIDDEN).to(dtype), rows(tokens, CHANNELS).to(dtype)
    shapes = (2 * CHANNELS, HIDDEN), (HIDDEN, CHANNELS)
    weights = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(8)]

    def products(linear: Callable[[Tensor, Tensor], Tensor]) -> None:
        for in_proj, out_proj in weights:
            linear(inner, in_proj)
            linear(outer, out_proj)

    return {
        "simba": lambda: products(lambda x, weight: OPS.linear(x, weight, None, None, None)),
        "torch": lambda: products(F.linear),
    }


def linear_of_a_prompt() -> dict[str, Call]:
    return linears(TOKENS)


def linear_of_a_prompt_in_bfloat16() -> dict[str, Call]:
    return linears(TOKENS, torch.bfloat16)


def linear_of_kept_tokens() -> dict[str, Call]:
    return linears(TOKENS // 10)


def linear_of_a_step() -> dict[str, Call]:
    return linears(1)


def linear_of_eight_steps() -> dict[str, Call]:
    return linears(8)


def rms_norm() -> dict[str, Call]:
    x, weight = rows(TOKENS, HIDDEN), torch.randn(HIDDEN)
    return {
        "simba": lambda: OPS.rms_norm(x, weight, 1e-5),
        "torch": lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
    }


def add_norm() -> dict[str, Call]:
    residual, x, weight = rows(TOKENS, HIDDEN), rows(TOKENS, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    index = torch.arange(0, TOKENS, 2)[None]
    x = x[:, : TOKENS // 2].contiguous()

    def apart() -> Tensor:
        return OPS.rms_norm((OPS.gather(residual, index, 1) + x).bfloat16(), weight, 1e-5)

    return {"simba": lambda: OPS.add_norm(residual, x, weight, 1e-5, index), "simba, its parts": apart}


def select() -> dict[str, Call]:
    scores = torch.randn(1, TOKENS, dtype=torch.float64)
    return {
        "simba": lambda: OPS.select(scores, KEPT, 0, 1),
        "torch": lambda: scores.topk(KEPT).indices.sort(1).values,
    }


def gather() -> dict[str, Call]:
    x, index = rows(TOKENS, HIDDEN), torch.randperm(TOKENS)[:KEPT].sort().values[None]
    return {
        "simba": lambda: OPS.gather(x, index, 1),
        "torch": lambda: x.gather(1, index[:, :, None].expand(1, KEPT, HIDDEN)),
    }


def restore() -> dict[str, Call]:
    base, value, index = rows(TOKENS, HIDDEN), rows(KEPT, HIDDEN), torch.randperm(TOKENS)[:KEPT].sort().values[None]
    return {
        "simba": lambda: OPS.restore(base, [value], [index]),
        "torch": lambda: base.scatter(1, index[:, :, None].expand(value.shape), value),
    }


def state_update() -> dict[str, Call]:
    x, dt, A, B, C, D, z, dt_bias = mixer_inputs(1)
    inputs = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], dt_bias, True)
    state = torch.zeros(1, CHANNELS, STATES)
    return {
        "simba": lambda: OPS.state_update(state, *inputs),
        "torch": lambda: reference.state_update(state, *inputs),
    }


def conv_update() -> dict[str, Call]:
    state, x, weight = torch.zeros(1, CHANNELS, WIDTH), torch.randn(1, CHANNELS), torch.randn(CHANNELS, WIDTH)
    bias = torch.randn(CHANNELS)
    return {
        "simba": lambda: OPS.conv_update(state, x, weight, bias, True),
        "torch": lambda: reference.conv_update(state, x, weight, bias, True),
    }


def mixer_update() -> dict[str, Call]:
    """The steps of eight mixers, with the projections around them, which drive what they read and call out of the caches."""
    hidden = rows(1, HIDDEN)
    layers = []
    for _ in range(8):
        _, _, A, _, _, D, _, dt_bias = mixer_inputs(1)
        states = torch.zeros(1, CHANNELS, STATES), torch.zeros(1, CHANNELS, WIDTH)
        conv, x_proj = torch.randn(CHANNELS, WIDTH), torch.randn(RANK + 2 * STATES, CHANNELS) / CHANNELS**0.5
        outer = torch.randn(2 * CHANNELS, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, CHANNELS) / CHANNELS**0.5
        layers.append((*outer, *states, conv, None, x_proj, torch.randn(CHANNELS, RANK) / RANK**0.5, dt_bias, (-A).log(), D))

    def parts(state, window, projected, conv, bias, x_proj, dt_proj, dt_bias, A_log, D):  # type: ignore[no-untyped-def]
        x, z = projected[:, 0].chunk(2, -1)
        u = OPS.conv_update(window, x, conv, bias, True)
        dt, B, C = OPS.linear(u, x_proj, None, None, None).split([RANK, STATES, STATES], -1)
        dt = OPS.linear(dt, dt_proj, None, None, None)
        return OPS.state_update(state, u, dt, A_log, B, C, D, z, dt_bias, True, True)[:, None]

    calls = {"simba": OPS.mixer_update, "simba, its parts": parts}
    return {name: functools.partial(step, hidden, layers, mixer) for name, mixer in calls.items()}


def step(h: Tensor, layers: list[tuple[Any, ...]], mixer: Callable[..., Tensor]) -> Tensor:
    """A token through mixers: the weights of each one's outer projections, its states, and what else the mixer is given."""
    for in_proj, out_proj, state, window, *weights in layers:
        projected = OPS.linear(h, in_proj, None, None, None)
        h = OPS.linear(mixer(state, window, projected, *weights), out_proj, None, None, None)
    return h


def mamba2_inputs() -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, dt_bias: x, B and C are slices of the convolution's output, dt one of in_proj's."""
    x, B, C = rows(TOKENS, CHANNELS + 2 * STATES_2).split([CHANNELS, STATES_2, STATES_2], -1)
    dt = rows(TOKENS, 2 * CHANNELS + 2 * STATES_2 + HEADS)[..., -HEADS:]
    step = torch.empty(HEADS).uniform_(-6.9, -2.3).exp()
    dt_bias = step + torch.log(-torch.expm1(-step))
    A = -torch.empty(HEADS).uniform_(1, 16)
    return x.unflatten(-1, (HEADS, HEAD)), dt, A, B[:, :, None], C[:, :, None], torch.ones(HEADS), dt_bias


def ssd_scan() -> dict[str, Call]:
    x, dt, A, B, C, D, bias = mamba2_inputs()
    index = torch.randperm(TOKENS)[:KEPT].sort().values[None]
    return {
        "simba": lambda: OPS.ssd_scan(x, dt, A, B, C, D, bias, True, 0.0, torch.inf, None, None),
        "simba, half kept": lambda: OPS.ssd_scan(x, dt, A, B, C, D, bias, True, 0.0, torch.inf, None, index),
        "transformers": lambda: mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D, bias, dt_softplus=True),
    }


def ssd_scan_and_backward() -> dict[str, Call]:
    inputs = [value.detach().clone().requires_grad_() for value in mamba2_inputs()]
    x, dt, A, B, C, D, bias = inputs
    grad = torch.randn(x.shape)

    def gradients(scan: Callable[[], Tensor]) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(scan(), inputs, grad)

    return {
        "simba": lambda: gradients(lambda: OPS.ssd_scan(*inputs, True, 0.0, torch.inf, None, None)[0]),
        "transformers": lambda: gradients(lambda: mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D, bias, dt_softplus=True)),
    }


def ssd_influence() -> dict[str, Call]:
    x, dt, A, B, C, _, bias = mamba2_inputs()
    inputs = (x, dt, A, B, C, bias, True, 0.0, torch.inf, "max", True)
    return {"simba": lambda: OPS.ssd_influence(*inputs), "torch": lambda: reference.ssd_influence(*inputs)}


def ssd_state_update() -> dict[str, Call]:
    x, dt, A, B, C, D, bias = mamba2_inputs()
    x, dt, B, C = (value[:, 0] for value in (x, dt, B, C))
    state = torch.zeros(1, HEADS, HEAD, STATES_2)

    def transformers() -> Tensor:  # as its mixer calls it
        steps, A_, D_ = dt[:, :, None].expand(-1, -1, HEAD), A[:, None, None].expand(-1, HEAD, STATES_2), D[:, None]
        bias_ = bias[:, None].expand(-1, HEAD)
        return mamba2_selective_state_update(state, x, steps, A_, B, C, D_, bias_, dt_softplus=True)

    return {"simba": lambda: OPS.ssd_state_update(state, x, dt, A, B, C, D, bias, True), "transformers": transformers}


def ssd_mixer_update() -> dict[str, Call]:
    """The steps of eight mixers, with the projections around them, which drive what they read and call out of the caches."""
    hidden, mixed = rows(1, HIDDEN), CHANNELS + 2 * STATES_2
    layers = []
    for _ in range(8):
        *_, A, _, _, D, bias = mamba2_inputs()
        states = torch.zeros(1, HEADS, HEAD, STATES_2), torch.zeros(1, mixed, WIDTH)
        outer = torch.randn(CHANNELS + mixed + HEADS, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, CHANNELS) / CHANNELS**0.5
        filters = torch.randn(mixed, WIDTH), torch.randn(mixed)
        layers.append((*outer, *states, *filters, bias, (-A).log(), D, torch.ones(CHANNELS), 1e-5, 1))

    def parts(state, window, projected, conv, conv_bias, bias, A_log, D, weight, eps, groups):  # type: ignore[no-untyped-def]
        gate, x, dt = projected[:, 0].split([CHANNELS, mixed, HEADS], -1)
        x, B, C = OPS.conv_update(window, x, conv, conv_bias, True).split([CHANNELS, STATES_2, STATES_2], -1)
        x, B, C = x.unflatten(-1, (HEADS, HEAD)), B[:, None], C[:, None]
        y = OPS.ssd_state_update(state, x, dt, A_log, B, C, D, bias, True, True).flatten(1)
        return OPS.gated_norm(y, gate, weight, eps, groups)[:, None]

    calls = {"simba": OPS.ssd_mixer_update, "simba, its parts": parts}
    return {name: functools.partial(step, hidden, layers, mixer) for name, mixer in calls.items()}


OPERATORS: dict[Callable[[], dict[str, Call]], tuple[str, ...]] = {
    influence: ("simba", "torch"),
    selective_scan: ("simba", "torch"),
    selective_scan_of_kept_tokens: ("simba", "simba, gathers first"),
    causal_conv1d: ("simba", "torch"),
    linear_of_a_prompt: ("simba", "torch"),
    linear_of_a_prompt_in_bfloat16: ("simba", "torch"),
    linear_of_kept_tokens: ("simba", "torch"),
    linear_of_a_step: ("simba", "torch"),
    linear_of_eight_steps: ("simba", "torch"),
    rms_norm: ("simba", "torch"),
    add_norm: ("simba", "simba, its parts"),
    select: ("simba", "torch"),
    gather: ("simba", "torch"),
    restore: ("simba", "torch"),
    state_update: ("simba", "torch"),
    conv_update: ("simba", "torch"),
    mixer_update: ("simba", "simba, its parts"),
    ssd_scan: ("simba", "simba, half kept", "transformers"),
    ssd_scan_and_backward: ("simba", "transformers"),
    ssd_influence: ("simba", "torch"),
    ssd_state_update: ("simba", "transformers"),
    ssd_mixer_update: ("simba", "simba, its parts"),
}


@pytest.mark.parametrize(
    ("operator", "contender"),
    [
        pytest.param(make, name, id=f"{make.__name__}-{name}", marks=pytest.mark.benchmark(group=make.__name__))
        for make, names in OPERATORS.items()
        for name in names
    ],
)
def test_operator(benchmark, operator: Callable[[], dict[str, Call]], contender: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    with torch.no_grad():
        benchmark(operator()[contender])

"""What is computed with the tokens last, written as operations on rows: the same numbers, by the operators wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from simba_compile.passes.rows import make_rows
from simba_compile.passes.tokens import SPLITS

OPS = torch.ops.simba
BATCH, CHANNELS, WIDTH = 2, 6, 4


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rewritten(function: Callable, x: Tensor, tokens: int) -> GraphModule:
    """The graph of a function of x after the pass; the axis of its tokens is symbolic, and so is the batch's."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example: list[Any]) -> GraphModule:
        make_rows(gm.graph)
        gm.graph.lint()
        gm.recompile()
        graphs.append(gm)
        return gm

    torch._dynamo.mark_dynamic(x, tokens)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(torch.compile(function, backend=backend, fullgraph=True)(x), function(x))
    (graph,) = graphs
    return graph


TAPS, PAIRED = numbers(CHANNELS, 1, WIDTH), numbers(CHANNELS, 2, WIDTH)


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.mark.parametrize("flat", [False, True])
def test_a_product_of_flattened_tokens(flat: bool) -> None:
    weight = numbers(5, CHANNELS)

    def project(h: Tensor) -> Tensor:
        batch, tokens, channels = h.shape
        across = h.reshape(batch * tokens, channels).t() if flat else h.permute(2, 0, 1).reshape(channels, batch * tokens)
        return (weight @ across).reshape(5, batch, tokens).permute(1, 0, 2)

    found = targets(rewritten(project, numbers(BATCH, 9, CHANNELS), 1))
    assert F.linear in found and not {"permute", "t", torch.matmul} & {*found}


APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tokens before the batch": lambda y, h: y.reshape(5, h.shape[1], h.shape[0]).permute(1, 0, 2),
    "channels last": lambda y, h: y.reshape(5, h.shape[0], h.shape[1]).permute(1, 2, 0),
    "another operation": lambda y, h: y.unflatten(1, h.shape[:2]).permute(1, 0, 2),
    "in the shape of another value": lambda y, h: y.reshape(h[..., :5].permute(2, 0, 1).shape).permute(1, 0, 2),
}


@pytest.mark.parametrize("case", APART)
def test_a_product_taken_apart_otherwise_stays(case: str) -> None:
    weight = numbers(5, CHANNELS)

    def project(h: Tensor) -> Tensor:
        batch, tokens, channels = h.shape
        return APART[case](weight @ h.permute(2, 0, 1).reshape(channels, batch * tokens), h)

    assert F.linear not in targets(rewritten(project, numbers(BATCH, 9, CHANNELS), 1))


def test_what_is_written_to_meanwhile_stays() -> None:
    """The rows, or what is convolved, are read before the write."""
    weight = numbers(5, CHANNELS)

    def project(x: Tensor) -> Tensor:
        h = x + 1
        batch, tokens, channels = h.shape
        product = weight @ h.permute(2, 0, 1).reshape(channels, batch * tokens)
        h[:, :, :3].mul_(2)
        return product.reshape(5, batch, tokens).permute(1, 0, 2) + h.mean()

    assert F.linear not in targets(rewritten(project, numbers(BATCH, 9, CHANNELS), 1))

    def convolve(x: Tensor) -> Tensor:
        h = x + 1
        y = F.conv1d(h, TAPS, padding=WIDTH - 1, groups=CHANNELS)
        h[:, :3].mul_(2)
        return y[..., : x.shape[-1]] + h.mean()

    assert OPS.causal_conv1d not in targets(rewritten(convolve, numbers(BATCH, CHANNELS, 9), 2))


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bias", [None, numbers(CHANNELS)], ids=["", "bias"])
def test_a_convolution_that_is_cut(bias: Tensor | None, rows: bool, activated: bool) -> None:
    weight = numbers(CHANNELS, 1, WIDTH)

    def convolve(x: Tensor) -> Tensor:
        if rows:  # as Mamba2 does
            y = F.conv1d(x.transpose(1, 2), weight, bias, padding=WIDTH - 1, groups=CHANNELS)
            y = y.transpose(1, 2)[:, : -(WIDTH - 1)]
        else:  # as Mamba does
            y = F.conv1d(x, weight, bias, padding=WIDTH - 1, groups=CHANNELS)[..., : x.shape[-1]]
        return F.silu(y) if activated else y

    found = targets(rewritten(convolve, numbers(BATCH, *((9, CHANNELS) if rows else (CHANNELS, 9))), 1 if rows else 2))
    assert OPS.causal_conv1d in found and not {torch.conv1d, F.silu} & {*found}


BEHIND_ZEROS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # of (batch, channel, token), and its token axis
    "padded": (lambda x: F.conv1d(F.pad(x, (3, 0)), TAPS, groups=CHANNELS), 2),
    "padded rows": (lambda x: F.conv1d(F.pad(x, (0, 0, 3, 0)).transpose(1, 2), TAPS, groups=CHANNELS), 1),
    "padded by a value": (lambda x: F.silu(F.conv1d(F.pad(x, (3, 0), value=0.0), TAPS, TAPS[:, 0, 0], groups=CHANNELS)), 2),
    "padded by a module": (lambda x: F.conv1d(torch.nn.ConstantPad1d((3, 0), 0.0)(x), TAPS, groups=CHANNELS), 2),
    "joined": (lambda x: F.conv1d(torch.cat([torch.zeros_like(x[..., :3]), x], -1), TAPS, groups=CHANNELS), 2),
    "joined rows": (
        lambda x: F.conv1d(torch.cat([x.new_zeros(x.shape[0], 3, CHANNELS), x], 1).transpose(1, 2), TAPS, groups=CHANNELS),
        1,
    ),
    "cut by narrow": (lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS).narrow(-1, 0, x.shape[-1]), 2),
}


@pytest.mark.parametrize("name", BEHIND_ZEROS)
def test_a_convolution_behind_zeros(name: str) -> None:
    convolve, axis = BEHIND_ZEROS[name]
    found = targets(rewritten(convolve, numbers(BATCH, *((9, CHANNELS) if axis == 1 else (CHANNELS, 9))), axis))
    assert OPS.causal_conv1d in found and torch.conv1d not in found


@pytest.mark.parametrize(
    "convolve",
    [
        lambda x: F.conv1d(F.pad(x, (4, 0)), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(F.pad(x, (3, 1)), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(F.pad(x, (3, 0), value=1.0), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(F.pad(x, (3, 0), mode="replicate"), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(F.pad(x, (0, 0, 3, 0)), torch.cat([TAPS, TAPS[:3]]), groups=CHANNELS + 3),
        lambda x: F.conv1d(torch.cat([torch.ones_like(x[..., :3]), x], -1), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(torch.cat([x, torch.zeros_like(x[..., :3])], -1), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(torch.cat([torch.zeros_like(x[..., :2]), x], -1), TAPS, groups=CHANNELS),
        lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS).narrow(2, 3, x.shape[-1]),
        lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS)[..., 3:],
        lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS)[:, :3, : x.shape[-1]],
        lambda x: F.conv1d(x, TAPS, padding=2, groups=CHANNELS)[..., : x.shape[-1]],
        lambda x: F.conv1d(x, PAIRED, padding=3, groups=3)[..., : x.shape[-1]],
        lambda x: F.conv1d(x, TAPS[..., 1:], padding=2, dilation=2, groups=CHANNELS)[..., : x.shape[-1]],
        lambda x: F.conv1d(x, TAPS[..., 1:], padding="same", groups=CHANNELS)[..., : x.shape[-1]],
        lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS) * 2,
        lambda x: F.conv1d(x, TAPS, padding=3, groups=CHANNELS)[:1],
        lambda x: F.conv1d(x[0], TAPS, padding=3, groups=CHANNELS)[..., : x.shape[-1]],
        lambda x: (y := F.conv1d(x, TAPS, padding=3, groups=CHANNELS), y[..., : x.shape[-1]]),
    ],
)
def test_other_convolutions_stay(convolve: Callable) -> None:
    gm = rewritten(convolve, numbers(BATCH, CHANNELS, 9), 2)
    assert torch.conv1d in targets(gm) and OPS.causal_conv1d not in targets(gm)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tokens", [2, 9])
def test_the_window_that_a_cache_keeps(tokens: int, rows: bool) -> None:
    """The last tokens, with zeros in front of fewer."""

    def window(x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if rows else x
        return F.pad(x, (WIDTH - x.shape[-1], 0))

    gm = rewritten(window, numbers(BATCH, *((tokens, CHANNELS) if rows else (CHANNELS, tokens))), 1 if rows else 2)
    (node,) = gm.graph.find_nodes(op="call_function", target=OPS.last_tokens)
    assert node.args[1:] == (WIDTH, 1 if rows else 2)


def test_other_padding_stays() -> None:
    for pad in (
        lambda x: F.pad(x, (0, WIDTH - x.shape[-1])),
        lambda x: F.pad(x, (2, 0)),
        lambda x: F.pad(x, (x.shape[-1] - 3, 0)),
        lambda x: F.pad(x, (3, 0), value=1.0),
        lambda x: torch._C._nn.pad(x, (WIDTH - x.shape[-1], 0), value=1.0),
    ):
        torch._dynamo.reset()
        assert OPS.last_tokens not in targets(rewritten(pad, numbers(BATCH, CHANNELS, 9), 2))


@pytest.mark.parametrize(
    "split",
    [
        lambda across: across.chunk(2, dim=1),
        lambda across: torch.chunk(across, 2, 1),
        lambda across: across.split([2, 4], dim=1),
        lambda across: torch.split(across, [1, 5], dim=1),
    ],
)
def test_a_split_of_the_channels(split: Callable) -> None:
    def cut(h: Tensor) -> Tensor:
        first, second = split(h.transpose(1, 2))
        return F.silu(first).sum(1) * second.sum(1)

    gm = rewritten(cut, numbers(BATCH, 9, CHANNELS), 1)
    (node,) = (node for node in gm.graph.nodes if node.target in SPLITS)
    assert node.args[0].op == "placeholder"


def test_a_split_of_the_tokens_stays() -> None:
    gm = rewritten(lambda h: h.transpose(1, 2).split(5, 2)[0], numbers(BATCH, CHANNELS, 9), 0)
    (node,) = (node for node in gm.graph.nodes if node.target in SPLITS)
    assert node.args[0].target == "transpose"

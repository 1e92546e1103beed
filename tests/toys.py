"""A small Mamba-like model, and what Dynamo captures of a function: graphs to test the passes on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from simba_compile.passes import lower

OPS = torch.ops.simba
HIDDEN, WIDTH, STATES, RANK, TAPS = 6, 10, 3, 2, 4


class Toy(nn.Module):
    """A mixer in operators of ours, with an RMS norm before it and a residual add after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.in_proj = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.conv = nn.Parameter(torch.randn(WIDTH, TAPS))
        self.x_proj = nn.Linear(WIDTH, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, WIDTH)
        self.A = nn.Parameter(-torch.rand(WIDTH, STATES) - 0.1)
        self.out_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """A layer, in float32."""
        return h + self.mixer(h)

    def mixer(self, h: Tensor) -> Tensor:
        """What it adds to the stream."""
        wide = h.to(torch.float32)
        normed = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
        x, z = self.in_proj(normed).transpose(1, 2).chunk(2, dim=1)
        x = OPS.causal_conv1d(x.transpose(1, 2), self.conv, None, True)
        dt, B, C = torch.split(self.x_proj(x), [RANK, STATES, STATES], dim=-1)
        dt = self.dt_proj.weight @ dt.transpose(1, 2)
        z = z.transpose(1, 2)
        y, _ = OPS.selective_scan(x, dt.transpose(1, 2), self.A, B, C, None, z, self.dt_proj.bias, True, None)
        return self.out_proj(y)


def heads(h: Tensor) -> Tensor:
    """Two of them, as attention has them: (batch, head, token, channel), those of a token together in memory."""
    return h.unflatten(2, (2, -1)).transpose(1, 2)


class Captured:
    """A module's graph with symbolic batch and length, and the tensors that Dynamo runs it on."""

    def __init__(self, module: Callable, *inputs: Tensor, gradients: bool = False) -> None:
        def backend(gm: GraphModule, _: Any) -> Callable:
            self.gm = gm

            def run(*args: Any) -> Any:
                self.args = args
                return gm(*args)

            return run

        torch._dynamo.reset()
        for value in inputs:
            torch._dynamo.mark_dynamic(value, 0)
            torch._dynamo.mark_dynamic(value, 1)
        with torch.set_grad_enabled(gradients):
            self.result = torch.compile(module, backend=backend, fullgraph=True)(*inputs)

    def targets(self, graph: GraphModule | None = None) -> list[Any]:
        """What its nodes call."""
        return [node.target for node in (graph or self.gm).graph.nodes if node.op.startswith("call")]

    def lowered(self, error: float = 1e-5) -> list[Any]:
        """What its nodes call once it is lowered; the results are the same up to a relative error."""
        lower(self.gm)
        with torch.no_grad():
            result = self.gm(*self.args)
        result = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(result, self.result, rtol=error, atol=error / 10)
        return self.targets()


def lowered_step(
    module: nn.Module, shapes: Sequence[tuple[int, ...]], symbolic: bool
) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """A decoding step, given a token and states, whose batch may be symbolic: what its lowered graph calls.

    Also its results and what became of the states; and the module's.
    """
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Callable:
        graphs.append(gm)
        lower(gm)
        return gm

    def inputs() -> list[Tensor]:
        source = torch.Generator().manual_seed(shapes[0][0])
        return [torch.randn(shape, generator=source) for shape in shapes]

    given, expected = inputs(), inputs()
    torch._dynamo.reset()
    for value in given if symbolic else ():
        torch._dynamo.mark_dynamic(value, 0)
    with torch.no_grad():
        theirs = copy.deepcopy(module)(*expected)
        ours = torch.compile(module, backend=backend, fullgraph=True)(*given)
    ours, theirs = ([value for value in out if value is not None] for out in (ours, theirs))
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    return targets, [*ours, *given[1:]], [*theirs, *expected[1:]]


@functools.cache
def toys(layers: int) -> nn.Module:
    """So many layers."""
    torch.manual_seed(layers)
    return nn.Sequential(*(Toy() for _ in range(layers)))


def tokens(length: int = 20) -> Tensor:
    """A batch of two sequences."""
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length))


def normed(x: Tensor, dim: int | Sequence[int] = -1, eps: float = 1e-5) -> Tensor:
    """An RMS norm over some axis."""
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


def half_written(x: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and what it was multiplied through: a view, so that the write stays one."""
    return x, x.transpose(1, 2)[:, :3].mul_(2)


matrix = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))

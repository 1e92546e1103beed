"""Views, copies and writes in place, among what the passes rewrite: a graph that has gone through them is the function.

Random programs over values of one shape. A value may be a view of another one, a copy of it, or computed from it by what the
passes match (norms, products, residual adds, gathers, convolutions); a write may go through any view. Nothing here prunes.
`SIMBA_FUZZ_EXAMPLES=1000 pytest tests/test_aliasing.py` runs longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from toys import HIDDEN, OPS, matrix, tokens

from simba_compile.passes import lower
from simba_compile.passes.functional import allow_any_layout, make_functional
from simba_compile.passes.rows import make_rows

EXAMPLES = int(os.environ.get("SIMBA_FUZZ_EXAMPLES", "0"))
LENGTH = 7
Function = Callable[[Tensor], Tensor]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SCALE, TAPS = drawn(HIDDEN), drawn(HIDDEN, 1, 4)


def gather(x: Tensor) -> Tensor:
    """The tokens in another order."""
    return OPS.gather(x, torch.arange(x.shape[1]).flip(0).expand(2, -1).contiguous(), 1)


def rms(x: Tensor) -> Tensor:
    """As Hugging Face writes it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def gated(x: Tensor) -> Tensor:
    """The norm after the scan of Mamba-2, in two groups."""
    y = x * F.silu(x)
    grouped = y.view(*y.shape[:-1], 2, HIDDEN // 2)
    return SCALE * rms(grouped).view(y.shape)


def pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """A gate, which is gathered, and the piece beside it."""
    piece, gate = F.linear(x, torch.cat([matrix, matrix])).split([HIDDEN, HIDDEN], -1)
    return gather(gate), piece


def product_of_columns(x: Tensor) -> Tensor:
    """As mamba_ssm projects."""
    batch, length, channels = x.shape
    return (matrix @ x.permute(2, 0, 1).reshape(channels, batch * length)).reshape(-1, batch, length).permute(1, 2, 0)


SAME: dict[str, Function] = {  # the value itself or a view of all of it
    "index": lambda x: x[:],
    "view": lambda x: x.view(x.shape),
    "reshape": lambda x: x.reshape(x.shape[0], -1).reshape(x.shape),
    "flatten": lambda x: x.flatten(1).unflatten(1, x.shape[1:]),
    "narrow": lambda x: x.narrow(2, 0, HIDDEN),
    "there and back": lambda x: x.transpose(1, 2).transpose(1, 2),
    "mT": lambda x: x.mT.mT,
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
    "expand": lambda x: x.expand_as(x),
    "chunk": lambda x: x.chunk(1, -1)[0],
    "evaluation": lambda x: F.dropout(x, training=False),
    "detach": lambda x: x.detach(),
}
MADE: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {  # a value of its own, or several
    "clone": lambda x: x.clone(),
    "wide": lambda x: x.double().float(),
    "across": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "viewed across": lambda x: x.transpose(1, 2).contiguous().view(len(x), -1).view(len(x), HIDDEN, -1).transpose(1, 2),
    "silu": F.silu,
    "add": lambda x: x + 1,
    "norm": rms,
    "scaled norm": lambda x: SCALE * rms(x.to(torch.float32)),
    "norm of a copy": lambda x: SCALE * rms(x.clone()),
    "gated norm": gated,
    "linear": lambda x: F.linear(x, matrix),
    "columns": product_of_columns,
    "rows": lambda x: (matrix @ x.transpose(1, 2)).transpose(1, 2),
    "gather": gather,
    "gather after": lambda x: gather(F.silu(x)),
    "pieces": pieces,
    "convolution": lambda x: F.conv1d(x.transpose(1, 2), TAPS, padding=3, groups=HIDDEN)[..., : x.shape[1]].transpose(1, 2),
    "shuffled": lambda x: torch.cat(x.transpose(1, 2).split([2, HIDDEN - 2], dim=1)[::-1], 1).transpose(1, 2),
}
WRITTEN: dict[str, Function] = {  # the part of a value that is written to
    "all": lambda x: x,
    "a token": lambda x: x[:, 2],
    "channels": lambda x: x[..., 1:4],
    "across": lambda x: x.transpose(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 3),
    "unbind": lambda x: x.unbind(2)[3],
    "a sequence": lambda x: x[0],
}
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mul_": lambda part, _: part.mul_(0.5),
    "imul": lambda part, _: part.__imul__(0.5),
    "fill": lambda part, _: part.__setitem__(Ellipsis, 0.25),
    "copy": lambda part, other: part.copy_(other.mean()),
    "relu": lambda part, _: F.relu(part, inplace=True),
}
ADDED = ("plain", "linear", "gathered")
Step = tuple[str, str, str, int, int]


def run(steps: list[Step], returned: list[int], h: Tensor) -> tuple[Tensor, ...]:
    """All values at the end in one, and some of them; places are counted from the newest value back."""
    values = [h + 1]
    for kind, name, how, a, b in steps:
        x, y = values[-1 - a % len(values)], values[-1 - b % len(values)]
        if kind == "same":
            values.append(SAME[name](x))
        elif kind == "made":
            made = MADE[name](x)
            values += made if isinstance(made, tuple) else [made]
        elif kind == "write":
            WRITES[how](WRITTEN[name](x), y)
        elif name == "linear":
            values.append(x + F.linear(y, matrix))
        elif name == "gathered":
            values.append(gather(x) + F.linear(y, matrix))
        else:
            values.append(x + y)
    return torch.stack(values), *(values[-1 - place % len(values)] for place in returned)


places = st.sampled_from((0, 0, 0, 1, 1, 2, 3))
names = {"same": sorted(SAME), "made": sorted(MADE), "write": sorted(WRITTEN), "add": ADDED}
steps = st.sampled_from(("same", "made", "made", "write", "write", "add")).flatmap(
    lambda kind: st.tuples(st.just(kind), st.sampled_from(names[kind]), st.sampled_from(sorted(WRITES)), places, places)
)


def _step(kind: str, name: str, how: str = "", a: int = 0, b: int = 0) -> Step:
    return kind, name, how, a, b


@settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(steps, min_size=3, max_size=8), st.lists(places, max_size=2))
@example([_step("made", "across"), _step("same", "contiguous"), _step("write", "a sequence", "copy")], [])
@example([_step("made", "across"), _step("same", "reshape"), _step("write", "all", "mul_", 1)], [])
@example([_step("made", "across"), _step("made", "norm"), _step("same", "flatten"), _step("write", "all", "fill")], [])
@example([_step("made", "across"), _step("made", "viewed across"), _step("write", "all", "mul_", 1)], [])
@example([_step("made", "across"), _step("made", "norm"), _step("made", "viewed across")], [])
@example([_step("made", "pieces"), _step("same", "contiguous"), _step("write", "channels", "mul_")], [])
@example([_step("made", "silu"), _step("made", "across")], [0, 1])
def test_writes_are_seen_by_who_saw_them(steps: list[Step], returned: list[int]) -> None:
    """Writes of the program, and those of its caller into what it returns."""
    note(f"{steps}, {returned}")
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: object) -> GraphModule:
        make_functional(gm.graph)
        allow_any_layout(gm.graph)
        make_rows(gm.graph)
        lower(gm)
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    h = tokens(LENGTH)
    torch._dynamo.mark_dynamic(h, 1)
    with torch.no_grad():
        expected = run(steps, returned, h)
        actual = torch.compile(run, backend=backend, fullgraph=True)(steps, returned, h)
        for values in (expected, actual):
            for value in values[1:2]:
                value.mul_(0.5)
    assert len(graphs) == 1
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

"""Random Mamba-like models: a small grammar, the module that runs it, and an interpreter of the contract for it.

A program is a list of statements over a growing list of values, each (batch, token, channel), the first of which is made of
the input (`STARTS`). `Program` runs it with Hugging Face's blocks and mixers, as a model would be written. `interpretations`
runs the same program token set by token set, in eager float64: every value is held at full length together with its
*version* (how many prunings it has gone through); what a pruned token is not defined for is NaN, so that a result which
rests on it cannot pass for right. Which tokens stayed, and how many entered each convolution, is what spies saw while the
compiled model ran; that those tokens are the right ones is checked against the eager reference's scores.

Where the contract leaves a choice, the interpreter branches (`Choices`), and a result is right if it is that of one branch:
an operation that treats tokens apart may also run on restored ones, and in an add onto the stream outside of a mixer's own
the tokens that left either take part or keep what they had.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import eager_reference as eager
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import Tensor, nn
from toys import heads

HIDDEN, LAYERS = 16, 3
Function = Callable[[Tensor], Tensor]


@functools.cache
def layers(family: str) -> nn.ModuleList:
    """Blocks of Hugging Face's, with weights under which tokens differ."""
    return tiny_model(family, torch.float64, layers=LAYERS, hidden_size=HIDDEN, state_size=4).backbone.layers


def _constant(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))) / 4


MATRIX, TAPS, ROW, SINGLE = _constant(HIDDEN, HIDDEN), _constant(HIDDEN, 1, 3), _constant(HIDDEN), _constant(1)


def rms(h: Tensor, dim: int = -1) -> Tensor:
    """An RMS norm."""
    return h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-5)


def arange(h: Tensor) -> Tensor:
    """Positions."""
    return torch.arange(h.shape[1], device=h.device)


def mixed(h: Tensor, weights: Tensor) -> Tensor:
    """Attention-like: tokens weighted by (batch, token, token)."""
    return torch.softmax(weights, -1) @ h


# The sequence that the first statement reads, made of the input's: the mixers' length is no input's then.
STARTS: dict[str, Function] = {
    "as it is": lambda x: x,
    "a class token": lambda x: torch.cat([ROW.expand(x.shape[0], 1, -1), x], 1),
    "a class token at the end": lambda x: torch.cat([x, ROW.expand(x.shape[0], 1, -1)], 1),
    "without the last": lambda x: x[:, :-1],
    "twice": lambda x: torch.cat([x.flip(1), x], 1),
}
# Treat tokens apart: computed on kept tokens as on all.
APART: dict[str, Function] = {
    "silu": F.silu,
    "scale": lambda h: 0.5 * h,
    "linear": lambda h: F.linear(h, MATRIX),
    "linear and bias": lambda h: F.linear(h, MATRIX, ROW),
    "product": lambda h: h @ MATRIX,
    "product from the left": lambda h: (MATRIX @ h.transpose(1, 2)).transpose(1, 2),
    "rms": rms,
    "weighted rms": lambda h: (1 + ROW) * rms(h),
    "rms with one weight": lambda h: (1 + SINGLE) * rms(h),
    "layer norm": lambda h: F.layer_norm(h, (HIDDEN,)),
    "softmax of channels": lambda h: h.softmax(-1) * 4,
    "less the mean channel": lambda h: h - h.mean(-1, keepdim=True),
    "heads": lambda h: h.view(h.shape[0], h.shape[1], 4, -1).transpose(2, 3).reshape(h.shape),
    "per head": lambda h: F.silu(h.unflatten(-1, (4, 4))).flatten(2),
    "half the channels": lambda h: torch.where(torch.arange(HIDDEN) < 8, h, -h),
    "gated": lambda h: h * torch.sigmoid(h),
    "clipped": lambda h: h.clamp(-1.5, 1.5),
    "all of it": lambda h: h[:, :, :][..., :],
    "over the length": lambda h: h / h.shape[1] * 20,
    "times the length": lambda h: h * h.shape[1] * 0.05,
    "over the root of the length": lambda h: h * 4 / h.shape[1] ** 0.5,
    "batch of it all": lambda h: h.expand(h.shape[0], h.shape[1], HIDDEN),
    "casts": lambda h: h.to(torch.float64).contiguous(),
}
# As those, but nothing promises that the compiler knows it.
EITHER: dict[str, Function] = {
    "channels reversed": lambda h: h.flip(-1),
    "channels rolled": lambda h: torch.roll(h, 1, -1),
    "channels sorted": lambda h: h.sort(-1).values,
    "channels concatenated": lambda h: torch.cat([h[..., 8:], h[..., :8]], -1),
    "channels summed up": lambda h: h.cumsum(-1) / 4,
    "einsum of channels": lambda h: torch.einsum("bth,kh->btk", h, MATRIX),
    "flat linear": lambda h: F.linear(h.reshape(-1, HIDDEN), MATRIX).view(h.shape),
    "flat rms": lambda h: rms(h.flatten(0, 1)).unflatten(0, h.shape[:2]),
    "turned": lambda h: F.silu(h.transpose(0, 1)).transpose(0, 1),
    "pad and cut": lambda h: F.pad(h, (0, 0, 0, 3))[:, : h.shape[1]],
    "glu": lambda h: F.glu(torch.cat([h, h], -1), -1),
    "tanh of halves": lambda h: torch.cat([x.tanh() for x in h.chunk(2, -1)], -1),
    "addcmul": lambda h: torch.addcmul(h, h, ROW),
    "lerp": lambda h: torch.lerp(h, ROW.expand_as(h), 0.3),
    "stacked": lambda h: torch.stack([h, -h], 2)[:, :, 0],
    "as strided copies": lambda h: h.repeat(1, 1, 2)[..., ::2],
    "buffer": lambda h: torch.zeros_like(h) + h,
    "new": lambda h: h.new_ones(h.shape) * h,
    "nothing dropped": lambda h: F.dropout(h, 0.5, training=False),
    "where found": lambda h: torch.where(h.isfinite(), h, torch.zeros_like(h)),
    "positions of length": lambda h: h + torch.full((h.shape[0], h.shape[1], 1), h.shape[1]) * 0.01,
    "positions": lambda h: h + arange(h)[None, :, None] * 0.01,
    "even positions": lambda h: h * (arange(h) % 2 == 0)[None, :, None],
    "no-op mask": lambda h: h.masked_fill(h > 1.0, 1.0),
}
# Look along the tokens (or at other sequences): must see full-length values.
LOOK: dict[str, Function] = {
    "shift": lambda h: h + F.pad(h, (0, 0, 1, 0))[:, :-1],
    "shift by cat": lambda h: torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1),
    "difference": lambda h: torch.cat([h[:, :1], h[:, 1:] - h[:, :-1]], 1),
    "roll": lambda h: h.roll(1, 1),
    "roll back": lambda h: torch.roll(h, -2, dims=1),
    "flip": lambda h: h.flip(1),
    "mean": lambda h: h + h.mean(1, keepdim=True),
    "mean over dims": lambda h: h - h.mean((1, 2), keepdim=True),
    "sum by length": lambda h: h - h.sum(1, keepdim=True) / h.shape[1],
    "largest": lambda h: h - h.amax(1, keepdim=True),
    "max values": lambda h: h - h.max(1, keepdim=True).values,
    "norm of tokens": lambda h: rms(h, 1),
    "cumsum": lambda h: h.cumsum(1) / 8,
    "cumulative mean": lambda h: h.cumsum(1) / (arange(h) + 1)[None, :, None],
    "softmax": lambda h: h * torch.softmax(h, 1) * 8,
    "softmax function": lambda h: h * F.softmax(h, dim=-2) * 8,
    "softmax of a row": lambda h: h * torch.softmax(h.mean(-1), -1)[..., None] * 8,
    "attention": lambda h: mixed(h, h @ h.transpose(1, 2)),
    "causal attention": lambda h: mixed(
        h,
        (h @ h.transpose(-1, -2)).masked_fill(arange(h)[:, None] < arange(h), -torch.inf),
    ),
    "sdpa": lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=True)[:, 0],
    "attention of heads": lambda h: mixed(heads(h), heads(h) @ heads(h).transpose(2, 3) * 0.5).transpose(1, 2).flatten(2),
    "causal attention of heads": lambda h: (
        mixed(heads(h), heads(h) @ heads(h).transpose(2, 3) / 2 + -1e4 * (arange(h)[:, None] < arange(h)))
        .transpose(1, 2)
        .flatten(2)
    ),
    "einsum of tokens": lambda h: mixed(h, torch.einsum("bth,bsh->bts", h, h)),
    "conv": lambda h: F.conv1d(h.transpose(1, 2), TAPS, padding=1, groups=HIDDEN).transpose(1, 2),
    "pooled": lambda h: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "last": lambda h: h + h[:, -1:],
    "last, squeezed": lambda h: h + h[:, -1][:, None],
    "first": lambda h: h + h[:, :1],
    "first, squeezed": lambda h: h + h[:, 0].unsqueeze(1),
    "middle": lambda h: h + h[:, h.shape[1] // 2][:, None],
    "reversed by index": lambda h: h[:, h.shape[1] - 1 - arange(h)],
    "index select": lambda h: h.index_select(1, arange(h) // 2),
    "gather": lambda h: h.gather(1, (arange(h) // 2)[None, :, None].expand(h.shape)),
    "take along": lambda h: torch.take_along_dim(h, h.argsort(1), 1),
    "sorted": lambda h: h.sort(1).values,
    "doubled": lambda h: torch.cat([h, h.flip(1)], 1)[:, : h.shape[1]],
    "cat and cut": lambda h: torch.cat([h[:, -1:], h], 1)[:, 1:],
    "chunks swapped": lambda h: torch.cat(h.tensor_split(2, 1)[::-1], 1),
    "scrambled": lambda h: h.reshape(h.shape[0], HIDDEN, h.shape[1]).transpose(1, 2),
    "flat softmax": lambda h: h * h.reshape(-1, HIDDEN).softmax(0).view(h.shape) * 30,
    "flat roll": lambda h: h.reshape(-1, HIDDEN).roll(1, 0).view(h.shape),
    "flat cumsum": lambda h: h.flatten(0, 1).cumsum(0).view(h.shape) / 20,
    "batch mean": lambda h: h - h.mean(0, keepdim=True),
    "batch softmax": lambda h: h * h.softmax(0),
    "batch flip": lambda h: h.flip(0),
    "batch roll": lambda h: h + h.roll(1, 0),
    "across batch": lambda h: h + (h[:, None] * h[None]).mean(1) / 4,
    "across batch, expanded": lambda h: h.unsqueeze(1).expand(-1, h.shape[0], -1, -1).transpose(0, 1).mean(1),
    "mean of all": lambda h: h * (1 + h.mean()),
    "deviation": lambda h: h / (1 + h.std(1, keepdim=True)),
    "group norm": lambda h: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2),
    "layer norm of tokens": lambda h: F.layer_norm(h, h.shape[1:]),
    "normalize": lambda h: F.normalize(h, dim=1) * 4,
    "blocks": lambda h: (
        F.pad(h, (0, 0, 0, -h.shape[1] % 4)).unflatten(1, (-1, 4)).mean(2).repeat_interleave(4, 1)[:, : h.shape[1]]
    ),
    "rank": lambda h: h + h.argsort(1).double() * 0.01,
    "above the mean": lambda h: h * (h > h.mean(1, keepdim=True)),
    "masked sum": lambda h: h + (h * (arange(h) < 5)[None, :, None]).sum(1, keepdim=True) / 5,
    "linear over positions": lambda h: (h.transpose(1, 2) @ torch.cos(arange(h)[:, None] * arange(h)).double()).mT / 8,
    "outer cumulative": lambda h: torch.tril(h @ h.transpose(1, 2)) @ h / 50,
    "unfolded": lambda h: F.pad(h, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "logcumsumexp": lambda h: h.logcumsumexp(1) / 4,
    "in place": lambda h: h.clone().mul_(h.mean(1, keepdim=True) + 1),
    "first zeroed": lambda h: h.index_fill(1, torch.tensor([0]), 0.0),
}
# Run on the tokens that are left, as docs/method.md has it.
ATTENDS = {"sdpa", "attention", "causal attention", "einsum of tokens", "attention of heads", "causal attention of heads"}
# Written as ``h + ...``: adds onto the stream, in which those who left may keep what they had.
ONTO = {"positions", "positions of length", "shift", "mean", "last", "last, squeezed", "first", "first, squeezed", "middle"}
ONTO |= {"batch roll", "across batch", "rank", "masked sum"}
# With boolean masks that have data-dependent sizes: they break graphs.
BREAKS: dict[str, Function] = {
    "selected": lambda h: h * (1 + h[h > 0.5].mean()),
    "printed number": lambda h: h * (2.0 if h.mean().item() > 0 else 1.5),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "torch.add": torch.add,
    "method": lambda a, b: a.add(b),
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * torch.tanh(b),
    "choose": lambda a, b: torch.where(a > b, a, b),
    "add the mapped": lambda a, b: a + F.linear(b, MATRIX),
    "addition weighted": lambda a, b: torch.add(a, b, alpha=0.5),
}
PARTS = ("add", "torch.add", "method")  # those that may be adds onto the stream
# Writes into a value that other statements have read, or will.
WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda h: h.add_(1),
    "mul_": lambda h: h.mul_(0.5),
    "first token": lambda h: h.__setitem__((slice(None), 0), 0.0),
    "channels": lambda h: h.__setitem__((Ellipsis, slice(0, 4)), 1.0),
    "masked": lambda h: h.masked_fill_(h > 1, 0.0),
    "a view of it": lambda h: h.transpose(1, 2).mul_(0.5),
    "from itself": lambda h: h.copy_(h.flip(1)),
    "relu": lambda h: F.relu(h, inplace=True),
}
ENDS: dict[str, Function] = {
    "all": lambda h: h,
    "normed": lambda h: (1 + ROW) * rms(h),
    "last": lambda h: h[:, -1],
    "last three": lambda h: h[:, -3:],
    "mean": lambda h: h.mean(1),
    "largest": lambda h: h.amax(1),
    "flat": lambda h: h.reshape(-1, HIDDEN),
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """One step: what it does, to which values (indices into the list), with which layer or function.

    Kinds: "block" (a whole block), "mixer" (``b + mixer(norm(a))``), "no norm" (``b + mixer(a)``), "minus"
    (``b - mixer(a)``), "gated" (``b + sigmoid(b) · mixer(norm(a))``), "beside" (``b + (mixer(norm(a)) + linear(a))``), "raw"
    (``mixer(a)``), the tables' names in lower case ("apart", "either", "look", "breaks", "join"), "copy", "write".
    """

    kind: str
    name: str = ""
    a: int = 0
    b: int = 0
    layer: int = 0


MIXERS = ("block", "mixer", "no norm", "minus", "gated", "beside", "raw")
TABLES: dict[str, dict[str, Function]] = {"apart": APART, "either": EITHER, "look": LOOK, "breaks": BREAKS}


class Program(nn.Module):
    """A model that runs statements on what it makes of its input."""

    def __init__(
        self, statements: list[Statement], outputs: list[tuple[int, str]], family: str, start: str = "as it is"
    ) -> None:
        super().__init__()
        self.statements, self.outputs, self.family, self.layers = statements, outputs, family, layers(family)
        self.start = start

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs: ends of values."""
        values = [STARTS[self.start](x)]
        for step in self.statements:
            values.append(self.step(step, values))
        return tuple(ENDS[end](values[place]) for place, end in self.outputs)

    def step(self, step: Statement, values: list[Tensor]) -> Tensor:
        """The value of one statement; "write" also changes another."""
        a, b, layer = values[step.a], values[step.b], self.layers[step.layer]
        if step.kind == "block":
            return layer(a)
        if step.kind == "mixer":
            return b + layer.mixer(layer.norm(a))
        if step.kind == "no norm":
            return layer.mixer(a) + b
        if step.kind == "minus":
            return b - layer.mixer(a)
        if step.kind == "gated":
            return b + torch.sigmoid(b) * layer.mixer(layer.norm(a))
        if step.kind == "beside":
            return b + (layer.mixer(layer.norm(a)) + F.linear(a, MATRIX))
        if step.kind == "raw":
            return layer.mixer(a)
        if step.kind == "join":
            return JOINS[step.name](a, b)
        if step.kind == "copy":
            return a.clone()
        if step.kind == "write":
            WRITES[step.name](a)
            return a
        return TABLES[step.kind][step.name](a)


# --- the contract ----------------------------------------------------------------------------------------------------


class Choices:
    """Walks over all branches of a computation that asks it: `take(n)` is 0..n-1, each once, depth first."""

    def __init__(self) -> None:
        self.path: list[list[int]] = []
        self.at = 0

    def take(self, n: int) -> int:
        """The branch to take here."""
        if self.at == len(self.path):
            self.path.append([0, n])
        self.at += 1
        return self.path[self.at - 1][0]

    def branches(self, limit: int) -> Iterator[None]:
        """Once for each branch, up to a limit."""
        for _ in range(limit):
            self.at = 0
            yield
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


@dataclasses.dataclass
class Value:
    """A value at full length, NaN where a token that left has none; `version` says which tokens it is up to date for."""

    full: Tensor
    version: int
    stream: bool = False  # whether it is a state of the residual stream


@dataclasses.dataclass
class Seen:
    """What spies saw of one call of the compiled model.

    Attributes
    ----------
    entered : list of int
        For each mixer, in order, how many tokens its convolution ran on.
    chosen : dict
        Pruning mixer → what its select returned.
    protect_first, protect_last : int
        What the selects were called with.
    """

    entered: list[int]
    chosen: dict[int, Tensor]
    protect_first: int = 0
    protect_last: int = 1


class Interpreter:
    """One run of a program under the contract, on one branch of what it leaves open."""

    def __init__(self, program: Program, x: Tensor, seen: Seen, placement: str, choices: Choices) -> None:
        self.program, self.seen, self.placement, self.choices = program, seen, placement, choices
        x = STARTS[program.start](x)
        everyone = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        self.alive = [everyone]  # version → positions of its tokens
        self.values = [Value(x, 0, True)]
        self.mixers = 0

    def run(self) -> tuple[Tensor, ...]:
        """The outputs."""
        for step in self.program.statements:
            self.values.append(self.step(step))
        return tuple(ENDS[end](self.values[place].full) for place, end in self.program.outputs)

    def step(self, step: Statement) -> Value:
        """The value of one statement."""
        a, b, layer = self.values[step.a], self.values[step.b], self.program.layers[step.layer]
        if step.kind in MIXERS:
            normed = a.full if step.kind in ("no norm", "minus", "raw") else layer.norm(a.full)
            out, pruned = self.mix(layer.mixer, Value(normed, a.version))
            if step.kind == "raw":
                return out
            onto = a if step.kind == "block" else b
            if step.kind == "minus":
                out.full = -out.full
            if step.kind == "gated":
                out = Value(torch.sigmoid(b.full) * out.full, max(b.version, out.version))
            if step.kind == "beside":
                side = Value(F.linear(a.full, MATRIX), a.version)
                out = Value(out.full + side.full, max(out.version, side.version))
                if self.choices.take(2):  # those who left keep the stream, or get the other branch's share
                    version = max(out.version, onto.version)
                    full = torch.where(self.mask(version), onto.full + out.full, onto.full + side.full)
                    return Value(full, version + pruned, True)
            version = max(onto.version, out.version)
            # No residual add, or one onto a view of the stream by a mixer that ran on all tokens: maybe of restored values.
            restores = step.kind == "minus" or (not onto.stream and out.version == 0)
            if version and restores and self.choices.take(2):
                return Value(onto.full + out.full, 0)
            result = self.add_onto(onto, out)
            result.version += pruned  # placement "layer": the sum loses tokens
            return result
        if step.kind == "copy":
            return Value(a.full.clone(), a.version, a.stream)
        if step.kind == "write":
            written = a.full.clone()
            WRITES[step.name](written)
            a.full = written
            return a
        if step.kind == "join":
            return self.join(step.name, a, b)
        if step.name in ATTENDS and a.version:  # tokens that are left, to one another
            rows = self.alive[a.version]
            return self.spread(LOOK[step.name](eager._take(a.full, rows)), rows, a.version)
        full, onto = TABLES[step.kind][step.name](a.full), a.stream and step.name in ONTO
        ways = {"apart": [a.version], "either": [a.version, 0], "look": [0, a.version], "breaks": [0]}[step.kind]
        results = [Value(full, version, onto) for version in ways]
        if onto:
            results.append(Value(torch.where(self.mask(a.version), full, a.full), a.version, True))
        return results[self.choices.take(len(results)) if a.version and len(results) > 1 else 0]

    def mask(self, version: int) -> Tensor:
        """Which tokens a version has, (batch, token, 1)."""
        batch, length = self.alive[0].shape
        return torch.zeros(batch, length, dtype=torch.bool).scatter(1, self.alive[version], True)[..., None]

    def add_onto(self, onto: Value, out: Value) -> Value:
        """``onto + out``, where those who left keep what they had."""
        version = max(onto.version, out.version)
        return Value(torch.where(self.mask(version), onto.full + out.full, onto.full), version, True)

    def join(self, name: str, a: Value, b: Value) -> Value:
        """A function of two values: an add may be one onto the stream."""
        version = max(a.version, b.version)
        ways = [Value(JOINS[name](a.full, b.full), version, name in PARTS and (a.stream or b.stream))]
        if version and name in (*PARTS, "addition weighted", "add the mapped"):
            for one in (a,) if name == "add the mapped" else (a, b):
                if one.stream:
                    ways.append(Value(torch.where(self.mask(version), ways[0].full, one.full), version, True))
        if version:  # or of restored values
            ways.append(Value(ways[0].full, 0, ways[0].stream))
        return ways[self.choices.take(len(ways)) if len(ways) > 1 else 0]

    def mix(self, mixer: nn.Module, value: Value) -> tuple[Value, int]:
        """A mixer's output, and 1 where its residual add is yet to lose tokens."""
        entered, chosen = self.seen.entered[self.mixers], self.seen.chosen.get(self.mixers)
        self.mixers += 1
        counts = [tokens.shape[1] for tokens in self.alive]
        assert entered in counts, f"{entered} tokens entered a convolution; there are {counts}"
        rows = self.alive[counts.index(entered)]
        inputs = eager._before_scan(mixer, eager._take(value.full, rows), None)
        if chosen is None:
            return self.spread(eager._scan_and_after(mixer, inputs)[0], rows, counts.index(entered)), 0
        latest = self.alive[-1]
        inputs = inputs.take(torch.searchsorted(rows.contiguous(), latest.contiguous()))
        k = chosen.shape[1]
        scores = eager._scores(mixer, inputs, k, "influence", "max", "include")
        best = eager.select(scores, k, self.seen.protect_first, self.seen.protect_last)
        assert torch.equal(best, chosen), "other tokens were kept than those with the best scores"
        self.alive.append(eager._take(latest, chosen))
        if self.placement == "scan":
            output = eager._scan_and_after(mixer, inputs.take(chosen))[0]
            return self.spread(output, self.alive[-1], len(self.alive) - 1), 0
        return self.spread(eager._scan_and_after(mixer, inputs)[0], latest, len(self.alive) - 2), 1

    def spread(self, output: Tensor, rows: Tensor, version: int) -> Value:
        """What was computed for some tokens, at their places; the others have none."""
        batch, length = self.alive[0].shape
        full = output.new_full((batch, length, output.shape[2]), torch.nan)
        return Value(full.scatter(1, rows[..., None].expand_as(output), output), version)


def interpretations(
    program: Program, x: Tensor, seen: Seen, placement: str, limit: int = 200
) -> Iterator[tuple[Tensor, ...]]:
    """Every result that the contract allows, one for each branch."""
    choices = Choices()
    for _ in choices.branches(limit):
        yield Interpreter(program, x, seen, placement, choices).run()

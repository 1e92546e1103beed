"""Random Mamba-like models through the backend: pruned as the contract says, or dense with a reason; never wrong.

SIMBA_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py runs longer, on other models each time (hypothesis prints how to run a
failing one again).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SELECTING, exact_casts
from fuzz_models import (
    APART,
    BREAKS,
    EITHER,
    ENDS,
    JOINS,
    LOOK,
    MIXERS,
    STARTS,
    WRITES,
    Program,
    Seen,
    Statement,
    interpretations,
)
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import simba_compile.backend
from simba_compile.kernels import reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.native import conv as native_conv
from simba_compile.passes import Transformed

EXAMPLES = int(os.environ.get("SIMBA_FUZZ_EXAMPLES", "0"))
HIDDEN = 16
CONVOLVING = native_conv if binding.available() else reference


class Watch:
    """Runs every compiled graph in one of three ways, and sees what its selects and convolutions do.

    `way` is "dense" (the lowered dense graph), "everything" (the pruned graph, with counts as large as the sequence) or
    "pruned" (as the backend runs it).
    """

    def __init__(self) -> None:
        self.way = "pruned"
        self.graphs: list[Transformed] = []
        self.selected: list[tuple[Tensor, int, int]] = []
        self.entered: list[int] = []
        self.ran: list[Transformed] = []

    def run_by_length(self, result: Transformed, mode: str | None = None) -> Callable:
        """In the backend's place."""
        original = self.original(result, mode)
        self.graphs.append(result)

        def run(*args: Any) -> Any:
            self.ran.append(result)
            if self.way == "dense" or result.pruned is None or result.plan is None:
                return result.dense(*args) if self.way == "dense" else original(*args)
            if self.way == "pruned":
                return original(*args)
            tokens = result.plan.length.reader(result.dense.graph.find_nodes(op="placeholder"))(args)
            if tokens < result.plan.protect_first + result.plan.protect_last:  # never pruned, whatever is kept
                return original(*args)
            return result.pruned(*args, *[tokens] * len(result.plan.pruning))

        return run

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """With the spies in place."""
        select, conv = SELECTING.select, CONVOLVING.causal_conv1d

        def selecting(scores: Tensor, k: int, first: int, last: int) -> Tensor:
            self.selected.append((select(scores, k, first, last), first, last))
            return self.selected[-1][0]

        def convolving(x: Tensor, *args: Any) -> Tensor:
            self.entered.append(x.shape[1])
            return conv(x, *args)

        with pytest.MonkeyPatch.context() as patch:
            self.original = simba_compile.backend.run_by_length
            patch.setattr(simba_compile.backend, "run_by_length", self.run_by_length)
            patch.setattr(SELECTING, "select", selecting)
            patch.setattr(CONVOLVING, "causal_conv1d", convolving)
            yield

    def call(self, way: str, compiled: Callable, x: Tensor) -> tuple[Tensor, ...]:
        """The compiled model's outputs."""
        self.way = way
        self.selected.clear()
        self.entered.clear()
        self.ran.clear()
        return compiled(x.clone())


def near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """Equal to float64 rounding, which some of these models magnify."""
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= 1e-6 * b.abs() + 1e-7 * (1 + b.abs().max())).all())  # NaN: no
        for a, b in zip(ours, theirs, strict=True)
    )


def check(program: Program, shapes: list[tuple[int, int]], options: dict[str, Any]) -> list[str]:
    """The law that this file is about, for inputs of these shapes through one compiled model; says how it held."""
    torch._dynamo.reset()
    held = []
    watch = Watch()
    with torch.no_grad(), watch.installed():
        compiled = torch.compile(program, backend="simba", options=options)
        for seed, (batch, length) in enumerate(shapes):
            x = torch.randn(batch, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            with exact_casts():
                dense = program(x.clone())
            if not all(value.isfinite().all() for value in dense):
                held.append("no numbers")  # the model's own doing: a mean of nothing, say
                continue
            assert near(watch.call("dense", compiled, x), dense), "the dense graph is not the model"
            assert near(watch.call("everything", compiled, x), dense), "with every token kept, it is not the model"
            ours = watch.call("pruned", compiled, x)
            reasons = [mixer.reason for graph in watch.ran for mixer in graph.mixers]
            if not watch.selected:
                assert near(ours, dense), "nothing was pruned, but it is not the model"
                pruning = [graph for graph in watch.ran if graph.plan is not None]
                assert any(reasons) or not reasons or pruning, "dense without a reason"
                held.append("dense")
                continue
            assert all(a.shape == b.shape and a.isfinite().all() for a, b in zip(ours, dense, strict=True))
            (graph, *others) = [graph for graph in watch.ran if graph.mixers]
            placed_elsewhere = {"minus", "raw"} & {step.kind for step in program.statements}
            if others or (options["placement"] == "layer" and placed_elsewhere):
                held.append("pruned, in several graphs or from within")
                continue
            plan = graph.plan
            assert plan is not None
            chosen = dict(zip(plan.pruning, [index for index, *_ in watch.selected], strict=True))
            seen = Seen(list(watch.entered), chosen, *watch.selected[0][1:])
            with exact_casts():
                allowed = interpretations(program, x, seen, options["placement"])
                assert any(near(ours, one) for one in allowed), "pruned, and no reading of the contract gives this"
            held.append("pruned")
    return held


# --- random programs -------------------------------------------------------------------------------------------------

KINDS = ("block",) * 6 + ("mixer",) * 3 + MIXERS[2:] + ("apart",) * 4 + ("either",) * 2 + ("look",) * 5 + ("join",) * 4
NAMES = {"apart": APART, "either": EITHER, "look": LOOK, "breaks": BREAKS, "join": JOINS, "write": WRITES}
VIEWS = {"heads", "all of it", "casts", "batch of it all", "stacked", "nothing dropped"}  # may share their argument's memory


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of three to nine statements, all of which its outputs rest on."""
    steps: list[Statement] = []
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(st.sampled_from((*KINDS, "copy", "write", "breaks")))
        last = len(steps)
        a, b = (max(0, last - draw(st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3, 9)))) for _ in range(2))
        if kind == "write":
            copies = [i + 1 for i, step in enumerate(steps) if step.kind == "copy"]
            if not copies:
                kind = "copy"
            else:
                a = draw(st.sampled_from(copies))
                if any(step.a == a and step.name in VIEWS for step in steps):  # what aliases see is not what is tried here
                    kind = "block"
        name = draw(st.sampled_from(sorted(NAMES[kind]))) if kind in NAMES else ""
        layer = draw(st.integers(0, 2)) if kind in MIXERS else 0
        steps.append(Statement(kind, name, a, b, layer))
    places = {len(steps), *draw(st.sets(st.integers(1, len(steps)), max_size=1))}
    outputs = [(place, draw(st.sampled_from(("all", "all", *ENDS)))) for place in sorted(places)]
    start = draw(st.sampled_from(("as it is",) * 3 + tuple(STARTS)))
    return Program(steps, outputs, draw(st.sampled_from(("mamba", "falcon_mamba"))), start)


SHAPES = st.sampled_from([(2, 24), (3, 31), (2, 40), (1, 27), (2, 16), (4, 19), (2, 6), (3, 3), (2, 2), (20, 20)])
OPTIONS = st.fixed_dictionaries(
    {
        "keep": st.sampled_from([0.2, 0.5]),
        "schedule": st.sampled_from(["uniform", "linear", "linear"]),
        "placement": st.sampled_from(["scan", "scan", "layer"]),
        "protect_first": st.sampled_from([0, 0, 2]),
        "protect_last": st.sampled_from([1, 1, 3]),
        "min_tokens": st.sampled_from([1, 4]),
    }
)


@settings(
    max_examples=EXAMPLES or 10,
    derandomize=not EXAMPLES,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES else [])],  # shrinking compiles for minutes
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(programs(), st.lists(SHAPES, min_size=1, max_size=2), OPTIONS)
def test_random_models(program: Program, shapes: list[tuple[int, int]], options: dict[str, Any]) -> None:
    note(f"{program.start}\n{program.statements}\n{program.outputs} {program.family}")
    for way in check(program, shapes, options):
        event(way)


DEFAULTS: dict[str, Any] = {"keep": 0.3, "schedule": "uniform", "placement": "scan", "min_tokens": 2}
EACH = [(kind, name) for kind in ("apart", "either", "look", "breaks") for name in NAMES[kind]]
EACH += [("join", name) for name in JOINS] + [("write", name) for name in WRITES]
EACH += [(kind, "") for kind in MIXERS]


@pytest.mark.parametrize("start", STARTS if EXAMPLES else ["as it is", "a class token"])
@pytest.mark.parametrize(("kind", "name"), EACH if EXAMPLES else EACH[::16])
def test_each_function_between_two_blocks(kind: str, name: str, start: str) -> None:
    """All of them where SIMBA_FUZZ_EXAMPLES is set; some by default."""
    steps = [Statement("block", a=0)]
    if kind == "write":  # into what was read before, by tokens that have gone through a pruning since
        steps += [Statement("copy", a=0), Statement("join", "add", 1, 2), Statement("write", name, 2)]
        steps += [Statement("join", "add", 3, 2)]
    else:
        steps += [Statement(kind, name, 1, 0, 1), Statement("join", "add", 1, 2)]
    last = len(steps)
    steps += [Statement("block", a=last, layer=2)]
    check(Program(steps, [(last + 1, "all")], "mamba", start), [(2, 24)], DEFAULTS)


@pytest.mark.parametrize("name", WRITES if EXAMPLES else ["channels"])
def test_a_copy_that_is_written_to_is_the_stream(name: str) -> None:
    """A token that leaves has what was written, and not what was copied."""
    steps = [Statement("copy", a=0), Statement("write", name, 1), Statement("block", a=2), Statement("block", a=3, layer=2)]
    assert check(Program(steps, [(4, "all")], "mamba"), [(2, 24)], DEFAULTS) == ["pruned"]


@pytest.mark.parametrize("placement", ["scan", "layer"])
def test_a_mixer_may_read_the_stream_without_a_norm(placement: str) -> None:
    steps = [Statement("block"), Statement("no norm", a=1, b=1, layer=1), Statement("block", a=2, layer=2)]
    program = Program(steps, [(3, "all")], "mamba")
    assert check(program, [(2, 24)], {**DEFAULTS, "placement": placement}) == ["pruned"]

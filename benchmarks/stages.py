"""Where the time of a compiled run goes: its graph, node by node."""

import dataclasses
import functools
import operator
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from simba_compile.backend import simba
from simba_compile.capture import with_own_code
from simba_compile.passes import Transformed
from simba_compile.passes.scans import SCANS

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
OPERATORS = {
    "rms_norm": "norm",
    "add_norm": "norm",
    "causal_conv1d": "conv",
    "influence": "score",
    "select": "select",
    "selective_scan": "scan",
    "gather": "gather",
}
STAGES = ("norm", "in_proj", "conv", "x_proj", "dt_proj", "score", "select", "scan", "gather", "out_proj", "other")
SCORING = ("score", "select", "gather")
WEIGHT = re.compile(rf"_({'|'.join(PROJECTIONS)})_parameters_weight_$")


@dataclasses.dataclass(frozen=True)
class Ran:
    """One node of the graph in one run.

    Attributes
    ----------
    stage : str
        One of `STAGES`.
    seconds : float
    bytes : int
        What it has to read and to write at least.
    product : tuple of int or None
        (rows, inner, columns) of a matrix product.
    """

    stage: str
    seconds: float
    bytes: int
    product: tuple[int, int, int] | None


def stage_of(node: Node) -> str:
    """What a node is part of: by the operator, or by the weight that it multiplies with, or rows of it."""
    for source in node.all_input_nodes if node.target is not operator.getitem else ():
        weight: Node = source.args[0] if source.target is operator.getitem else source  # type: ignore[assignment]
        found = WEIGHT.search(weight.name) if weight.op == "placeholder" else None
        if found:
            return found[1]
    name = str(node.target).removeprefix("simba.") if str(node.target).startswith("simba.") else ""
    return OPERATORS.get(name, "other")


class _Clock(Interpreter):
    """Runs a graph and times its nodes."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.ran: list[Ran] = []
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        begin = time.perf_counter()
        result = super().call_function(target, args, kwargs)
        taken = time.perf_counter() - begin
        assert self.node is not None
        stage = stage_of(self.node)
        self.ran.append(Ran(stage, taken, _bytes(target, args, result), _product(args, result, stage)))
        return result


def _bytes(target: Any, args: tuple, result: Any) -> int:
    """What a call reads and writes, where each value is moved once; of what is gathered, only what is taken."""
    written = _size(pytree.tree_leaves(result))
    if target is torch.ops.simba.gather:
        return 2 * written
    if target not in SCANS:
        return written + _size(pytree.tree_leaves(args))
    kind = SCANS[target]
    named = kind.named(args)
    share = 1.0 if named["index"] is None else named["index"].shape[1] / named["x"].shape[1]
    read = sum(_size([value]) * (share if name in kind.along_tokens else 1.0) for name, value in named.items())
    return int(written + read)


def _size(values: Sequence[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _product(args: tuple, result: Any, stage: str) -> tuple[int, int, int] | None:
    if stage not in PROJECTIONS:
        return None
    inner = next(value for value in args if isinstance(value, Tensor) and value.dim() == 2).shape[1]
    return result.numel() // result.shape[-1], inner, result.shape[-1]


def clock(model: Callable, ids: Tensor, options: dict[str, Any], repeats: int) -> list[list[Ran]]:
    """Run a prompt up to the logits of the next token, and time what its graph does.

    Parameters
    ----------
    model : callable
        A model of Hugging Face's that makes one graph.
    ids : Tensor
        (batch, token).
    options : dict
        See `simba_compile.Options`.
    repeats : int
        Runs, after one that is not counted.

    Returns
    -------
    list of list of Ran
        For each run, the nodes that compute something.
    """
    runs: list[list[Ran]] = []

    @functools.wraps(simba)  # by which `capture` knows the backend
    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        found: list[Transformed] = []
        simba(gm, inputs, options=options, observe=found.append)
        made = found[0]

        def run(*args: Any) -> Any:
            graph, numbers = made.of_call(args, ids.shape[1])
            timed = _Clock(graph)
            result = timed.run(*args, *numbers)
            runs.append(timed.ran)
            return result

        return run

    def call() -> Any:
        return model(ids, use_cache=False, logits_to_keep=1)

    compiled = torch.compile(with_own_code(call), backend=backend)
    with torch.no_grad():
        for _ in range(repeats + 1):
            compiled()
    return runs[1:]


def seconds(runs: list[list[Ran]]) -> dict[str, float]:
    """The median over runs of the seconds of each stage."""
    return {
        stage: statistics.median(sum(node.seconds for node in run if node.stage == stage) for run in runs)
        for stage in STAGES
    }

"""One trace of a model, run at many options: tracing takes longer than most evaluations of a small model."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from transformers import PreTrainedModel

from simba_compile.backend import simba
from simba_compile.capture import with_own_code
from simba_compile.options import Options
from simba_compile.passes import Transformed
from simba_compile.passes.plan import ratios_of
from simba_compile.passes.scans import SCANS, Scan
from simba_compile.report import mixer_rows

BATCH_TOKENS = 16384


def _compiled(model: PreTrainedModel, backend: Callable) -> Callable:
    """The model under this backend, apart from what else was compiled of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return torch.compile(with_own_code(call), backend=backend)


class Variants:
    """A model under ``backend="simba"`` whose options may change from call to call.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.options = Options(keep=1.0)
        self.transformed: Transformed | None = None  # what ran last
        self._forward = _compiled(model, self._backend())

    def _backend(self) -> Callable:
        @functools.wraps(simba)  # by which `capture` knows the backend
        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable:
            made: dict[Options, tuple[Callable, Transformed]] = {}  # only the latest: each is a copy of the graph

            def at(options: Options) -> Callable:
                if options not in made:
                    made.clear()
                    found: list[Transformed] = []
                    given = dataclasses.asdict(options)
                    run = simba(copy.deepcopy(gm), inputs, options=given, observe=found.append)
                    made[options] = run, found[0]
                run, self.transformed = made[options]
                return run

            at(self.options)
            return lambda *args: at(self.options)(*args)

        return backend

    @torch.no_grad()
    def logits(self, options: Options, ids: Tensor, last: int) -> Iterator[Tensor]:
        """Run sequences of one length, in batches.

        Parameters
        ----------
        options : Options
        ids : Tensor
            (sequences, tokens).
        last : int
            Logits are computed at this many last positions, which are protected.

        Yields
        ------
        Tensor
            (sequences of the batch, last, vocabulary).
        """
        self.options = options
        rows = max(2, BATCH_TOKENS // ids.shape[1])
        # One sequence alone would take a graph of its own: the last one of an odd number runs twice.
        for part in ids.split(rows):
            batch = part if len(part) > 1 else part.expand(2, -1)
            yield self._forward(batch, use_cache=False, logits_to_keep=last).logits[: len(part)].float()

    def flops(self, tokens: int) -> tuple[int, int]:
        """Arithmetic of all mixers for one sequence, dense and at the options that ran last (score included).

        Raises
        ------
        RuntimeError
            Where nothing has run yet.
        ValueError
            For a model without mixers.
        """
        if self.transformed is None:
            raise RuntimeError("nothing has run yet: the mixers are known once the model was traced.")
        rows = mixer_rows(self.transformed, tokens)
        if not rows:
            raise ValueError(f"{type(self.model).__name__} has no mixer that the backend finds: there is nothing to prune.")
        return sum(row.flops_dense for row in rows), sum(row.flops_pruned for row in rows)

    def share(self, options: Options, tokens: int) -> float:
        """The share of the dense mixers' arithmetic that other options would take, by the plan of what ran last.

        They may differ from those in keep, schedule and every only.

        Raises
        ------
        RuntimeError
            Where nothing has run yet, or what ran last did not prune.
        """
        if self.transformed is None or self.transformed.plan is None:
            raise RuntimeError("nothing that prunes has run yet: there is no plan to go by.")
        plan = self.transformed.plan
        ratios, pruning = ratios_of(options, len(plan.ratios))
        planned = dataclasses.replace(plan, ratios=ratios, pruning=pruning)
        rows = mixer_rows(dataclasses.replace(self.transformed, plan=planned), tokens)
        return sum(row.flops_pruned for row in rows) / sum(row.flops_dense for row in rows)


@dataclasses.dataclass(frozen=True)
class ScanRead:
    """What one scan read in one call.

    Attributes
    ----------
    kind : Scan
        Which scan it is.
    arguments : dict of str to object
        The operator's arguments by name, their tokens already gathered.
    positions : Tensor
        (batch, token) int64: where in the sequence these tokens stand.
    """

    kind: Scan
    arguments: dict[str, Any]
    positions: Tensor


class _Recorder(Interpreter):
    """Runs a graph and notes what every scan reads."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.scans: list[ScanRead] = []
        self.positions: Tensor | None = None

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.simba.select:
            self.positions = result if self.positions is None else self.positions.gather(1, result)
        elif target in SCANS:
            self.scans.append(self._scan(SCANS[target], args))
        return result

    def _scan(self, kind: Scan, args: tuple) -> ScanRead:
        given = kind.named(args)
        if given["index"] is not None:
            for name in kind.along_tokens:
                if given[name] is not None:
                    given[name] = torch.ops.simba.gather(given[name], given["index"], 1)
        batch, tokens = given["x"].shape[:2]
        positions = torch.arange(tokens).expand(batch, tokens) if self.positions is None else self.positions
        return ScanRead(kind, given | {"index": None}, positions)


@torch.no_grad()
def record_scans(model: PreTrainedModel, ids: Tensor, options: Options, **call: Any) -> tuple[list[ScanRead], Any]:
    """Run a model once and return what each of its scans read.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family that the backend lifts.
    ids : Tensor
        (batch, token).
    options : Options
        With placement "scan": in a layer that prunes, the scan runs on the tokens that stay.
    **call
        Further arguments of the model.

    Returns
    -------
    list of ScanRead
        In the order in which they run.
    object
        The model's output.

    Raises
    ------
    ValueError
        For placement "layer", and for a model in which no scan was found.
    """
    if options.placement != "scan":
        raise ValueError(f"placement is {options.placement!r}; scans are recorded with 'scan' only.")
    scans: list[ScanRead] = []

    @functools.wraps(simba)
    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        found: list[Transformed] = []
        simba(gm, inputs, options=dataclasses.asdict(options), observe=found.append)
        made = found[0]

        def run(*args: Any) -> Any:
            graph, numbers = made.of_call(args, ids.shape[1])
            recorder = _Recorder(graph)
            result = recorder.run(*args, *numbers)
            scans.extend(recorder.scans)
            return result

        return run

    output = _compiled(model, backend)(ids, use_cache=False, **call)
    if not scans:
        raise ValueError(f"{type(model).__name__} has no scan that the backend lifts: there is nothing to look at.")
    return scans, output

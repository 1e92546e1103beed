"""`explain`: what the backend does to a model, mixer by mixer."""

import dataclasses
import inspect
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from simba_compile.backend import PADDED, simba
from simba_compile.capture import with_own_code
from simba_compile.options import Options
from simba_compile.passes import Transformed
from simba_compile.passes.length import Length, traced


@dataclasses.dataclass(frozen=True)
class MixerReport:
    """One mixer in one call.

    Attributes
    ----------
    path : str
        Where the module sits in the model.
    kind : str
        "mamba1" or "mamba2".
    tokens_in, tokens_out : int
        Tokens of a sequence that enter the mixer, and that are left after it.
    flops_dense, flops_pruned : int
        Its arithmetic for one sequence on all tokens, and with the options that were given (that of the influence included).
        With another criterion it may be too high: what only the influence needs on all tokens is counted on all tokens.
    reason : str or None
        Why it does not prune, where something keeps it from that.
    """

    path: str
    kind: str
    tokens_in: int
    tokens_out: int
    flops_dense: int
    flops_pruned: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `explain` returns. ``str(report)`` is a table, ``report.to_dict()`` the same as data.

    Attributes
    ----------
    mixers : tuple of MixerReport
        In the order in which they run.
    graphs : int
        How many graphs Dynamo made of the call: more than one means graph breaks.
    on_all_tokens : tuple of str
        Operations between mixers that run on all tokens, those that left too, though what follows runs on those that stay:
        the passes do not know that they treat tokens alike and apart. They cost time, and what mixes tokens there, such as
        attention written in an unusual way, reads those that left.
    """

    mixers: tuple[MixerReport, ...]
    graphs: int
    on_all_tokens: tuple[str, ...] = ()

    @property
    def flops_dense(self) -> int:
        """Arithmetic of all mixers for one sequence on all tokens."""
        return sum(mixer.flops_dense for mixer in self.mixers)

    @property
    def flops_pruned(self) -> int:
        """Arithmetic of all mixers for one sequence with the options that were given."""
        return sum(mixer.flops_pruned for mixer in self.mixers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        totals = {"flops_dense": self.flops_dense, "flops_pruned": self.flops_pruned, "graphs": self.graphs}
        mixers = [dataclasses.asdict(mixer) for mixer in self.mixers]
        return {"mixers": mixers, **totals, "on_all_tokens": list(self.on_all_tokens)}

    def __str__(self) -> str:
        if not self.mixers:
            return "No Mamba mixer was found: the model runs as it is.\n"
        table = Table(box=SIMPLE_HEAD)
        for name in ("mixer", "kind"):
            table.add_column(name)
        for name in ("tokens in", "tokens out", "GFLOP dense", "GFLOP pruned"):
            table.add_column(name, justify="right")
        table.add_column("left dense because")
        told = None
        for mixer in self.mixers:
            flops = (f"{mixer.flops_dense / 1e9:.2f}", f"{mixer.flops_pruned / 1e9:.2f}")
            tokens = (str(mixer.tokens_in), str(mixer.tokens_out))
            reason = "as above" if mixer.reason and mixer.reason == told else mixer.reason or ""
            table.add_row(mixer.path, mixer.kind, *tokens, *flops, reason)
            told = mixer.reason
        first, last = self.mixers[0], self.mixers[-1]
        ends = (str(first.tokens_in), str(last.tokens_out))
        totals = (f"{self.flops_dense / 1e9:.2f}", f"{self.flops_pruned / 1e9:.2f}")
        table.add_section()
        table.add_row(f"{len(self.mixers)} mixers", "", *ends, *totals, f"{self.graphs} graph(s)")
        text = io.StringIO()
        console = Console(file=text, width=140)
        console.print(table)
        if self.on_all_tokens:
            names = ", ".join(self.on_all_tokens)
            console.print(f"On all tokens, those that left too: {names}.", highlight=False, markup=False, soft_wrap=True)
        return text.getvalue()


def explain(model: Callable, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any) -> Report:
    """Show what ``torch.compile(model, backend="simba", options=options)`` does to one call of the model.

    The call is made, once, through the backend.

    Parameters
    ----------
    model : callable
        A module, or a function of one.
    *args, **kwargs
        What to call it with: the tokens in and out are those of this call.
    options : mapping or Options, optional
        See `simba_compile.Options`.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        For options that are not valid, and for one that was given to the model.

    Examples
    --------
    >>> report = simba_compile.explain(model, input_ids, options={"keep": 0.1})
    >>> print(report)
    """
    chosen = Options.from_mapping(options)
    _refuse_options(model, kwargs)
    rows: list[MixerReport] = []
    whole: list[str] = []
    graphs = 0

    def observing(gm: GraphModule, example_inputs: list[Any], **given: Any) -> Callable:
        nonlocal graphs
        graphs += 1
        found: list[Transformed] = []
        run = simba(gm, example_inputs, observe=found.append, **given)

        def observed(*inputs: Any) -> Any:
            described = _describe(found[0], inputs)
            rows.extend(described)
            if described and described[-1].tokens_out < described[0].tokens_in:
                whole.extend(found[0].on_all_tokens)
            return run(*inputs)

        return observed

    observing.__wrapped__ = simba  # type: ignore[attr-defined]  # how capture knows the backend

    def call() -> Any:
        return model(*args, **kwargs)

    fresh = with_own_code(call)
    torch.compile(fresh, backend=observing, options=dataclasses.asdict(chosen))()
    torch._dynamo.reset_code(fresh.__code__)
    return Report(tuple(rows), graphs, tuple(whole))


def _refuse_options(model: Callable, given: Mapping[str, Any]) -> None:
    """Models take any name and ignore what they do not know: an option among these would be lost."""
    for name in sorted(given.keys() & {field.name for field in dataclasses.fields(Options)}):
        if name not in inspect.signature(getattr(model, "forward", model)).parameters:
            option = {name: given[name]}
            raise ValueError(f"{name} is an option of the backend, not an argument of the model: pass options={option}.")


def _describe(result: Transformed, inputs: tuple) -> list[MixerReport]:
    """The rows of one graph, for the inputs of one call."""
    if not result.mixers:
        return []
    scanned = result.mixers[0].x
    length, arguments = Length(scanned), result.dense.graph.find_nodes(op="placeholder")
    try:
        tokens_of = length.reader(arguments)
    except ValueError:  # the length is made in the graph
        return mixer_rows(result, int(scanned.shape[1]))
    tokens = int(tokens_of(inputs))
    if result.plan is not None:
        result = dataclasses.replace(result, plan=result.plan.of_call(inputs))
    rows = mixer_rows(result, tokens)
    if result.plan is not None and rows[-1].tokens_out < tokens and result.plan.ends_in_padding(inputs):
        dense = mixer_rows(dataclasses.replace(result, plan=None), tokens)
        rows = [dataclasses.replace(row, reason=PADDED) for row in dense]
    return rows


def mixer_rows(result: Transformed, tokens: int) -> list[MixerReport]:
    """What the passes' result means for each mixer of a sequence of this length.

    A mixer of another sequence than the first one's, which is dense, has as many tokens as when the graph was made.
    """
    counts = [tokens] * len(result.mixers) if result.plan is None else result.plan.counts(tokens)
    rows, before, influence = [], tokens, result.options.criterion == "influence"
    first = Length(result.mixers[0].x).tokens if result.mixers else None
    for i, mixer in enumerate(result.mixers):
        if Length(mixer.x).tokens != first:
            own = traced(mixer.x.shape[1])
            dense = own * (mixer.entering_flops + mixer.scanned_flops)
            rows.append(MixerReport(mixer.path, mixer.kind, own, own, dense, dense, mixer.reason))
            continue
        reason = mixer.reason
        if reason is None and result.plan is not None and result.plan.pruning and counts[-1] == tokens:
            reason = result.plan.why_all_stay(tokens)
        scored = influence and result.plan is not None and i in result.plan.pruning and counts[-1] < tokens
        scanned = counts[i] if result.options.placement == "scan" else before
        flops = before * (mixer.entering_flops + scored * mixer.scoring_flops) + scanned * mixer.scanned_flops
        dense = tokens * (mixer.entering_flops + mixer.scanned_flops)
        rows.append(MixerReport(mixer.path, mixer.kind, before, counts[i], dense, flops, reason))
        before = counts[i]
    return rows

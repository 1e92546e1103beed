"""``simba eval``: what pruning costs, or gains, on text and on recall."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from simba_compile.analysis import budget, plots, recall
from simba_compile.analysis.evaluation import DENSE, Records, describe, equal_flops, evaluate, grid, rows
from simba_compile.analysis.intervals import paired
from simba_compile.analysis.tasks import RecallTask, Task, Text, TextTask, read_text
from simba_compile.analysis.variants import Variants
from simba_compile.cli import models, plot
from simba_compile.cli.show import Steps, told_of
from simba_compile.options import Options
from simba_compile.passes.plan import shares as shares_of

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for: see the options of `simba_compile.cli.eval`."""

    model: str
    task: str
    text: tuple[Path, ...]
    lengths: tuple[int, ...]
    choices: dict[str, list[Any]]
    windows: int
    last: int
    sequences: int
    pairs: tuple[int, ...]
    within: int | None
    smaller: str | None
    budget: float | None
    evaluations: int
    out: Path
    plot: Path | None


def run(request: Request) -> None:
    """See `simba_compile.cli.eval`."""
    with told_of():
        settings = grid(request.choices)
    _refuse_several(request)
    if request.plot is not None:
        plot.require(request.plot)
    try:
        records = Records(request.out)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    models.quiet()
    model = models.load(request.model, config_only=False, dtype=torch.float32)
    variants = Variants(model)
    vocabulary: int = model.config.get_text_config().vocab_size
    smaller = None if request.smaller is None else _smaller(request.smaller, vocabulary)
    console = Console()
    if request.budget is not None:
        _budget(console, request, variants, records, _text(request, vocabulary))
    else:
        drawn = []
        for task in _tasks(request, vocabulary):
            with told_of("--model"), Steps(len(settings) * len(request.lengths)) as steps:
                results = evaluate(variants, request.model, task, request.lengths, settings, records, steps.next)
            drawn += results
            _show(console, f"{request.model}, {_title(task)}", results)
            if smaller is not None:
                _compare(console, request, variants, smaller, records, task)
        if request.plot is not None:
            plots.evaluation(request.plot, drawn, f"model {Path(request.model).name}, task {request.task}")
    console.print(f"Written: {request.out}", markup=False, highlight=False)


def _refuse_several(request: Request) -> None:
    """Where shares are searched for, all else is one setting, and a budget's search is on one text: the rest is refused."""
    searching = {"--budget": request.budget is not None, "--smaller": request.smaller is not None}
    for option in (option for option, given in searching.items() if given):
        free = ("keep", "schedule") if option == "--budget" else ("keep",)
        several = [name for name, values in request.choices.items() if len(values) > 1 and name not in free]
        several += ["length"] if len(request.lengths) > 1 and option == "--budget" else []
        if several:
            named = ", ".join("--" + name.replace("_", "-") for name in several)
            raise typer.BadParameter(f"with it, an option takes one value; {named} has several.", param_hint=option)
    if request.budget is None:
        return
    beside = {"--task recall": request.task != "text", "--smaller": request.smaller, "--plot": request.plot}
    if any(beside.values()):
        named = ", ".join(option for option, given in beside.items() if given)
        raise typer.BadParameter(f"it chooses shares on a text, and goes without {named}.", param_hint="--budget")


def _smaller(name: str, vocabulary: int) -> Variants:
    """The smaller model, which has to read the same tokens."""
    model = models.load(name, config_only=False, dtype=torch.float32, option="--smaller")
    own: int = model.config.get_text_config().vocab_size
    if own != vocabulary:
        told = f"{name} has a vocabulary of {own}, and the model one of {vocabulary}: they read different tokens."
        raise typer.BadParameter(told, param_hint="--smaller")
    return Variants(model)


def _tasks(request: Request, vocabulary: int) -> list[Task]:
    with told_of():
        if request.task == "text":
            if request.within is not None:
                raise typer.BadParameter("it says where pairs stand, and goes with --task recall.", param_hint="--within")
            return [TextTask(_text(request, vocabulary), request.windows, request.last, max(request.lengths))]
        if vocabulary != recall.VOCABULARY:
            wanted = recall.VOCABULARY
            raise ValueError(f"{request.model} has a vocabulary of {vocabulary}; recall is made of {wanted} tokens.")
        tasks: list[Task] = [RecallTask(pairs, request.sequences, window=request.within) for pairs in request.pairs]
        for task, tokens in itertools.product(tasks, request.lengths):
            task.inputs(tokens)  # refuses what does not fit before anything runs
        return tasks


def _text(request: Request, vocabulary: int) -> Text:
    if not request.text:
        raise typer.BadParameter("the task 'text' needs a file to read.", param_hint="--text")
    try:
        return read_text(request.text, request.model, vocabulary)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"the text cannot be read: {reason}", param_hint="--text") from None


def _title(task: Task) -> str:
    if isinstance(task, TextTask):
        return f"{task.unit} of the last {task.last} of {len(task.ends)} windows of {task.text.name}"
    assert isinstance(task, RecallTask)
    near = "" if task.window is None else f" among the last {task.window} tokens"
    return f"accuracy of recall, {task.pairs} pairs{near}, {task.sequences} sequences"


def _show(console: Console, title: str, results: Sequence[Result]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("setting")
    for name in ("tokens", "FLOPs", f"{results[0]['unit']} (95%)", f"minus {describe(results[0]['of']['options'])} (95%)"):
        table.add_column(name, justify="right")
    for cells in rows(results):
        table.add_row(*cells)
    console.print(table)


# --- against a smaller model -----------------------------------------------------------------------------------------


def _compare(
    console: Console, request: Request, variants: Variants, smaller: Variants, records: Records, task: Task
) -> None:
    """The pruned model at the FLOPs of a smaller dense one, on the same sequences."""
    assert request.smaller is not None
    others = evaluate(smaller, request.smaller, task, request.lengths, [DENSE], records)
    probe, _ = task.inputs(request.lengths[0])
    base = _setting(request)
    for _ in variants.logits(base, probe[:2], task.last):
        pass
    table = Table(title=f"At the FLOPs of {request.smaller}, dense", title_justify="left", box=SIMPLE_HEAD)
    columns = ("tokens", "MFLOP", f"smaller: {task.unit}", "pruned: setting", f"pruned: {task.unit}", "pruned minus smaller")
    for name in columns:
        table.add_column(name, justify="right")
    for other in others:
        tokens = other["of"]["tokens"]
        options = equal_flops(variants, base, tokens, other["flops"])
        if options is None:
            table.add_row(str(tokens), f"{other['flops'] / 1e6:.0f}", f"{other['mean']:.3f}", "none has so few", "", "")
            continue
        [result] = evaluate(variants, request.model, task, [tokens], [options], records)
        mean, low, high = paired(result["values"], other["values"])
        table.add_row(
            str(tokens),
            f"{other['flops'] / 1e6:.0f}",
            f"{other['mean']:.3f}",
            describe(result["of"]["options"]),
            f"{result['mean']:.3f}",
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
        )
    console.print(table)


def _setting(request: Request, *free: str) -> Options:
    """The one setting whose shares are searched for: something that prunes, and the first value of each option but some."""
    first = {name: values[0] for name, values in request.choices.items() if name not in ("keep", *free)}
    return Options(keep=0.5, **first)


# --- the best list of shares for a budget ----------------------------------------------------------------------------


def _budget(console: Console, request: Request, variants: Variants, records: Records, text: Text) -> None:
    """Choose shares on the first half of the text, and compare them with the named schedules on the second."""
    assert request.budget is not None
    tokens, share = request.lengths[0], request.budget
    base = _setting(request, "schedule")
    with told_of():
        calibration, held_out = (TextTask(half, request.windows, request.last, tokens) for half in text.halves())
    probe, _ = calibration.inputs(tokens)
    for _ in variants.logits(base, probe[:2], request.last):
        pass
    with told_of("--model"):
        dense, _ = variants.flops(tokens)
    at_budget = [
        equal_flops(variants, dataclasses.replace(base, schedule=name), tokens, int(share * dense))
        for name in ("linear", "uniform")
    ]
    named = [options for options in at_budget if options is not None]
    if not named:
        least = variants.share(dataclasses.replace(base, schedule="uniform", keep=0.001), tokens)
        told = f"schedules take between {least:.2f} and 1 of the FLOPs at {tokens} tokens; {share} is not among them."
        if least >= 1:
            told = f"nothing is pruned at {tokens} tokens: {variants.transformed.plan.why_all_stay(tokens)}."  # type: ignore
        raise typer.BadParameter(told, param_hint="--budget")
    mixers = len(variants.transformed.plan.ratios)  # type: ignore[union-attr]

    def with_shares(shares: budget.Shares) -> Options:
        return dataclasses.replace(base, keep=1.0, schedule=shares)

    with Steps(request.evaluations + 2 * len(named) + 2) as steps:

        def objective(shares: budget.Shares) -> float:
            [result] = evaluate(variants, request.model, calibration, [tokens], [with_shares(shares)], records, steps.next)
            return result["mean"]

        def cost(shares: budget.Shares) -> float:
            return variants.share(with_shares(shares), tokens)

        starts = [tuple(round(each, budget.DIGITS) for each in shares_of(options, mixers)) for options in named]
        start = min(starts, key=objective)
        best, _ = budget.search(objective, cost, start, max(share, cost(start)), request.evaluations)
        settings = [*named, with_shares(best), DENSE]
        results = evaluate(variants, request.model, held_out, [tokens], settings, records, steps.next)
    console.print(f"Chosen on the {_title(calibration)}.", markup=False, highlight=False)
    _show(console, f"Held out: {_title(held_out)}", results)

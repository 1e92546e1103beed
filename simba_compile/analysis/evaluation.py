"""Score a model at a grid of options, and keep what was measured in a file that a stopped run goes on from."""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simba_compile.analysis.intervals import interval, paired
from simba_compile.analysis.tasks import Task, TextTask
from simba_compile.analysis.variants import Variants
from simba_compile.options import Options

DENSE = Options(keep=1.0)
INFLUENCE_ONLY = ("pool", "dt_bias")
DIGITS = 5  # of a value in the file
BEGINNING = b'{"of": '  # of every line in it


def grid(choices: Mapping[str, Sequence[Any]]) -> list[Options]:
    """All combinations of options, without those that mean the same as another.

    Parameters
    ----------
    choices : mapping
        Values to try by option.

    Returns
    -------
    list of Options
        The dense model first. What only the influence has (pool, dt_bias) varies for the influence alone, the seed for
        "random" alone.

    Raises
    ------
    ValueError
        For values that `Options` refuses.
    """
    found = {DENSE: None}  # a set that keeps its order
    for values in itertools.product(*choices.values()):
        options = Options(**dict(zip(choices, values, strict=True)))
        if options.keep == 1 and not isinstance(options.schedule, tuple):
            continue
        idle = [] if options.criterion == "influence" else [*INFLUENCE_ONLY]
        idle += [] if options.criterion == "random" else ["seed"]
        found[dataclasses.replace(options, **{name: getattr(DENSE, name) for name in idle})] = None
    return list(found)


def short(options: Options) -> dict[str, Any]:
    """The options that are not at their defaults, and always keep (a list of shares stands for it)."""
    given = dataclasses.asdict(options)
    defaults = dataclasses.asdict(Options())
    if isinstance(options.schedule, tuple):
        given["schedule"] = list(options.schedule)
        del given["keep"]
    return {name: value for name, value in given.items() if name == "keep" or value != defaults[name]}


class Records:
    """Results, one JSON object a line, in a file that is added to.

    Parameters
    ----------
    path : Path
        The file; it need not exist. A last line that was cut off is dropped.

    Raises
    ------
    OSError
        Where it cannot be read or made.
    ValueError
        Where it holds anything but results; it is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        lines, whole = text.splitlines(), text.endswith(b"\n")
        for i, line in enumerate(lines, 1):
            record = _record(line)
            if record is not None:
                self.found[_key(record["of"])] = record
                continue
            whole = False
            if i < len(lines) or not line.startswith(BEGINNING[: len(line)]):
                raise ValueError(f"line {i} of {path} is no result of simba eval: name another file, or remove the line.")
        if lines and not whole:
            file = path.resolve()  # what a link leads to
            repaired = file.with_name(file.name + ".repaired")  # so that a run that is stopped here loses nothing
            repaired.write_text("".join(json.dumps(record) + "\n" for record in self.found.values()))
            repaired.replace(file)

    def get(self, of: dict[str, Any]) -> dict[str, Any] | None:
        """The record of these settings, where there is one."""
        return self.found.get(_key(of))

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, on the disk too."""
        self.found[_key(record["of"])] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no text at all
        return None
    return record if isinstance(record, dict) and isinstance(record.get("of"), dict) else None


def _key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


def evaluate(
    model: Variants,
    name: str,
    task: Task,
    lengths: Sequence[int],
    settings: Sequence[Options],
    records: Records,
    before: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Score a model on a task at every length and setting; what `records` has already is not run again.

    Parameters
    ----------
    model : Variants
    name : str
        What the model is called in the records.
    task : Task
    lengths : sequence of int
        Tokens of a sequence.
    settings : sequence of Options
        The first is what the others are compared with.
    records : Records
    before : callable
        Is told what runs, before each length and setting, also one that is skipped.

    Returns
    -------
    list of dict
        For each setting and length "of" (what was scored), "flops" of one sequence's mixers, "share" (of the dense model's
        flops), "seconds", "mean", "interval", "values" (one for each sequence) and "difference", the paired mean, lower and
        upper difference to the first setting.
    """
    results = []
    baseline: dict[int, list[float]] = {}
    for options, tokens in itertools.product(settings, lengths):
        of = {"model": name, **task.describe(), "tokens": tokens, "options": short(options)}
        before(f"{tokens} tokens, {describe(of['options'])}")
        record = records.get(of)
        if record is None:
            record = {"of": of, **_score(model, task, tokens, options)}
            records.add(record)
        first = baseline.setdefault(tokens, record["values"])
        results.append(record | {"difference": paired(record["values"], first)})
    return results


def _score(model: Variants, task: Task, tokens: int, options: Options) -> dict[str, Any]:
    ids, targets = task.inputs(tokens)
    values: list[float] = []
    begin = time.perf_counter()
    for logits in model.logits(options, ids, task.last):
        values += task.values(logits, targets[len(values) : len(values) + len(logits)])
    seconds = time.perf_counter() - begin
    dense, flops = model.flops(tokens)
    mean = statistics.fmean(values)
    scored: dict[str, Any] = {
        "unit": task.unit,
        "flops": flops,
        "share": round(flops / dense, DIGITS),
        "seconds": round(seconds, 2),
        "mean": mean,
        "interval": interval(values),
        "values": [round(value, DIGITS) if value % 1 else int(value) for value in values],
    }
    return scored | ({"perplexity": task.perplexity(mean)} if isinstance(task, TextTask) else {})


def describe(options: Mapping[str, Any]) -> str:
    """Options on one line; "dense" for the dense model."""
    if options == short(DENSE):
        return "dense"

    def shown(value: Any) -> str:
        return " ".join(f"{share:.2f}" for share in value) if isinstance(value, list) else str(value)

    return ", ".join(f"{name} {shown(value)}" for name, value in options.items())


def equal_flops(model: Variants, options: Options, tokens: int, flops: int) -> Options | None:
    """The options with the `keep` at which the mixers take as many operations as these, or None where none does.

    Parameters
    ----------
    model : Variants
        At something that prunes: its plan is what counts.
    options : Options
        With a named schedule.
    tokens, flops : int
        Length of a sequence, and its arithmetic in the smaller model.
    """
    dense, _ = model.flops(tokens)
    low, high = 0.001, 1.0
    if not model.share(dataclasses.replace(options, keep=low), tokens) <= flops / dense <= 1:
        return None
    for _ in range(20):
        middle = (low + high) / 2
        if model.share(dataclasses.replace(options, keep=middle), tokens) <= flops / dense:
            low = middle
        else:
            high = middle
    return dataclasses.replace(options, keep=round(low, 4))


def rows(results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The cells of a table: setting, length, share of FLOPs, mean with interval, difference to dense with interval."""
    for result in results:
        (low, high), (mean, below, above) = result["interval"], result["difference"]
        yield [
            describe(result["of"]["options"]),
            str(result["of"]["tokens"]),
            f"{result['share']:.2f}",
            f"{result['mean']:.3f} ({low:.3f} to {high:.3f})",
            f"{mean:+.3f} ({below:+.3f} to {above:+.3f})",
        ]

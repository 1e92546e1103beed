"""What ``simba bench`` measured, as tables: on the terminal and in Markdown."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from simba_compile.cli.show import clock, markdown_table, spread, times

EAGER = "HF eager"
INDUCTOR = "HF Inductor"
DENSE = "simba keep 1.0"
PRUNED = "simba keep 0.1"
BARE = "matrix products"


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that is to be reached.

    Parameters
    ----------
    what : str
    value, limit : float
    least : bool
        Whether the limit is the least or the most that is allowed.
    """

    what: str
    value: float
    limit: float
    least: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.limit if self.least else self.value <= self.limit


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the medians against the project's targets."""
    prefill, decode, memory = results["prefill"], results["decode"], results["memory"]
    pruned = prefill[PRUNED]["median"]
    held = [Target("speedup over HF eager", prefill[EAGER]["median"] / pruned, 8.0, True)]
    if INDUCTOR in prefill:
        compiling = prefill[PRUNED]["compile"] / prefill[INDUCTOR]["compile"]
        held.append(Target("speedup over HF Inductor", prefill[INDUCTOR]["median"] / pruned, 5.0, True))
        held.append(Target("compile time / Inductor's", compiling, 0.25, False))
    held += [
        Target("speedup over simba keep 1.0", prefill[DENSE]["median"] / pruned, 1.6, True),
        Target("time / its matrix products alone", pruned / prefill[BARE]["median"], 1.25, False),
        Target("score, selection and gathers / time", results["scoring"]["share"], 0.08, False),
    ]
    if INDUCTOR in decode:
        step = decode[PRUNED]["median"] / decode[INDUCTOR]["median"]
        held.append(Target("one decoding step / Inductor's", step, 1.0, False))
    for other in (EAGER, DENSE):
        growth = memory[PRUNED]["growth_mib"] / max(memory[other]["growth_mib"], 0.1)
        held.append(Target(f"growth of the memory / that of {other}", growth, 1.0, False))
    return [dataclasses.asdict(target) | {"met": target.met} for target in held]


def sections(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables: title, headings, rows."""
    settings, pruned = results["settings"], results["prefill"][PRUNED]["median"]
    prompt = [
        [
            name,
            clock(timing["median"]),
            spread(timing),
            str(len(timing["runs"])),
            times(timing["median"] / pruned),
            clock(timing["compile"]) if "compile" in timing else "",
        ]
        for name, timing in results["prefill"].items()
    ]
    decode = [
        [name, clock(timing["median"]), spread(timing), str(len(timing["runs"]))]
        for name, timing in results["decode"].items()
    ]
    memory = [[name, f"{sizes['growth_mib']:.0f} MiB"] for name, sizes in results["memory"].items()]
    held = [
        [
            target["what"],
            f"{target['value']:.2f}",
            f"{'at least' if target['least'] else 'at most'} {target['limit']:g}",
            "yes" if target["met"] else "no",
        ]
        for target in results["targets"]
    ]
    return [
        (
            f"A prompt of {settings['tokens']} tokens, up to the next token's logits",
            ["", "median", "spread", "runs", "/ keep 0.1", "compiling"],
            prompt,
        ),
        ("One decoding step", ["", "median", "spread", "runs"], decode),
        ("Memory: growth of the peak over one prompt", ["", "growth"], memory),
        ("Targets", [PRUNED, "measured", "target", "met"], held),
    ]


def facts(results: dict[str, Any]) -> list[str]:
    """What the numbers depend on, line by line."""
    settings, about, scoring = results["settings"], results["machine"], results["scoring"]
    lines = [
        f"Machine: {about['cpu']} ({about['instructions']}), {about['cores']} cores, {about['threads']} threads; "
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}.",
        f"Model: Mamba with random weights, {settings['layers']} layers, hidden {settings['hidden_size']}, state "
        f"{settings['state_size']}, vocabulary {settings['vocab_size']}; batch 1, float32.",
        f"Command: `{results['command']}` ({results['date']}). The contenders ran in turns.",
        f"Of the pruned run, the score took {scoring['influence']:.1%}, the selection {scoring['select']:.1%}, the "
        f"gathers {scoring['gather']:.1%}.",
    ]
    return lines + [f"{name} did not run: {reason}" for name, reason in results["failed"].items()]


def markdown(results: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    parts = ["# simba bench", "\n".join(f"- {line}" for line in facts(results))]
    for title, headings, rows in sections(results):
        parts += [f"## {title}", markdown_table(headings, rows)]
    return "\n\n".join(parts) + "\n"


def show(results: dict[str, Any], console: Console) -> None:
    """Print the report."""
    for title, headings, rows in sections(results):
        table = Table(title=title, title_justify="left")
        table.add_column(headings[0])
        for heading in headings[1:]:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in facts(results):
        console.print(line, markup=False, highlight=False)

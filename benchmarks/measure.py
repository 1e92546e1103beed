"""Measure, and write docs/benchmarks.md.

    python benchmarks/measure.py                        # everything: about 20 minutes on two cores, 4 of them Inductor's
    python benchmarks/measure.py --only growth,limits
    python benchmarks/measure.py --quick                # does everything run? The numbers mean nothing

The parts are `peers` (all contenders in turns), `quality` (another paper's token reduction at equal FLOPs, on the testbeds),
`growth` (how cost grows) and `limits` (stages against what the machine can do). Each writes benchmarks/results/PART.json;
the page is made of all that are there. It is no command of `simba`'s: the package stays free of other papers' methods.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import growth
import limits
import page
import peers
import quality
import torch
import typer
from rich.console import Console

from simba_compile.cli import machine, models

PARTS: dict[str, Any] = {"peers": peers, "quality": quality, "growth": growth, "limits": limits}
ROOT = Path(__file__).parents[1]


def others() -> tuple[float, float] | None:
    """Seconds that cores have run other processes so far, and that they could have run; None where Linux does not tell."""
    try:
        ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    busy, idle, second = sum(ticks) - ticks[3] - ticks[4], ticks[3] + ticks[4], os.sysconf("SC_CLK_TCK")
    return busy / second - sum(os.times()[:4]), (busy + idle) / second


def shared(begin: tuple[float, float], end: tuple[float, float] | None) -> float:
    """The share of the cores that other processes took from one look to another: what a measurement was disturbed by."""
    assert end is not None
    return max(0.0, end[0] - begin[0]) / (end[1] - begin[1])


def main(
    only: Annotated[str, typer.Option(help="Parts, with commas; none: make the page again.")] = ",".join(PARTS),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, written to build/benchmarks.")] = False,
    skip_inductor: Annotated[bool, typer.Option("--skip-inductor", help="Compiling it takes minutes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. [default: benchmarks/results]")] = None,
    document: Annotated[Path | None, typer.Option(help="The page. [default: docs/benchmarks.md]")] = None,
) -> None:
    """Measure the parts that are named, and make the page of all that was measured."""
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    unknown = sorted({*chosen} - {*PARTS})
    if unknown:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; the parts are {', '.join(PARTS)}.", param_hint="--only")
    quickly = ROOT / "build/benchmarks"
    out = out or (quickly if quick else ROOT / "benchmarks/results")
    document = document or (quickly / "benchmarks.md" if quick else ROOT / "docs/benchmarks.md")
    out.mkdir(parents=True, exist_ok=True)
    models.quiet()
    logging.getLogger("simba_compile").setLevel(logging.ERROR)  # the token reduction's pieces stay dense on purpose
    console = Console(stderr=True)
    for name in chosen:
        part = PARTS[name]
        settings = part.Settings.quick() if quick else part.Settings()
        if name == "peers" and skip_inductor:
            settings = dataclasses.replace(settings, inductor=False)
        torch._dynamo.reset()
        results: dict[str, Any] = {
            "machine": machine.describe(),
            "command": machine.command("python", "benchmarks/measure.py"),
            "date": machine.now(),
        }
        begin = others()
        results |= part.measure(settings, lambda what: console.print(what, markup=False, highlight=False))
        results["others"] = None if begin is None else shared(begin, others())
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()}
    page.write(document, found)
    console.print(f"Written: {document}", markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)

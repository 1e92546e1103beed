"""Time a prompt at keep 0.1 with pruning at every mixer, every second and every fourth one (the option `every`), and dense.

    python benchmarks/every.py

A model of mamba-130m's size with random weights, 2048 tokens, batch 1, float32, up to the next token's logits; in turns.
What `every` does to quality is in docs/results.md.
"""

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import simba_compile
from simba_compile.cli import machine, models
from simba_compile.cli.show import clock, markdown_table, spread
from simba_compile.cli.timing import side_by_side

OUT = Path(__file__).parent / "results" / "every.json"
LAYERS, TOKENS, REPEATS = 24, 2048, 7
KEEP, STEPS = 0.1, (1, 2, 4)


@torch.no_grad()
def main(out: Annotated[Path, typer.Option(help="The figures, as JSON.")] = OUT) -> None:
    """Time a prompt with pruning at every mixer, every second and every fourth one, and dense; print a table."""
    models.quiet()
    model = models.random_mamba(LAYERS, models.MAMBA_130M)
    ids = models.random_ids(models.MAMBA_130M["vocab_size"], TOKENS)
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    settings: dict[str, dict[str, Any]] = {"dense": {"keep": 1.0}}
    settings |= {f"every {step}": {"keep": KEEP, "every": step} for step in STEPS}
    calls, shares = {}, {}
    for name, options in settings.items():
        report = simba_compile.explain(model, ids, options=options, **call)
        shares[name] = report.flops_pruned / report.flops_dense
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=4 * len(settings)):  # all are compiled from one forward
        for name, options in settings.items():
            calls[name] = functools.partial(torch.compile(model, backend="simba", options=options), ids, **call)
            calls[name]()
        timings = side_by_side(calls, dict.fromkeys(calls, REPEATS))
    figures = {name: {"share of the FLOPs": round(shares[name], 3), **timings[name].to_dict()} for name in settings}
    about = {
        "machine": machine.describe(),
        "layers": LAYERS,
        "tokens": TOKENS,
        "keep": KEEP,
        "command": machine.command("python", "benchmarks/every.py"),
        "date": machine.now(),
    }
    out.write_text(json.dumps(about | {"settings": figures}, indent=1) + "\n")
    dense = timings["dense"].median
    rows = [
        [name, f"{shares[name]:.2f}", clock(taken.median), spread(taken.to_dict()), f"{dense / taken.median:.2f}×"]
        for name, taken in timings.items()
    ]
    print(machine.one_line())
    print(markdown_table(["", "share of the FLOPs", "median", "spread", "faster than dense by"], rows))


if __name__ == "__main__":
    typer.run(main)

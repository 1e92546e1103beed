"""docs/benchmarks.md, of what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
from stages import SCORING, STAGES

from simba_compile.cli.bench_report import BARE, DENSE, PRUNED
from simba_compile.cli.show import clock, markdown_table, spread, times

Results = dict[str, Any]


def write(path: Path, found: dict[str, Results]) -> None:
    """Write the page and its pictures, which stand beside it.

    Parameters
    ----------
    path : Path
        The page.
    found : dict
        By part ("peers", "quality", "growth", "limits"), what its `measure` returned with "machine", "command" and "date".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[Results, Path], list[str]]] = {
        "peers": peers,
        "quality": quality,
        "growth": growth,
        "limits": limits,
    }
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/measure.py`: text and tables too, so change `benchmarks/page.py`, not this page. "
        "Every section says what measured it, and when: they may be of different states of "
        "the code. Times are medians, with the fastest and the slowest run; contenders of a "
        "table ran in turns. Models have random weights, float32 and batch 1 unless said otherwise; a prompt runs up to "
        "the logits of the next token.",
    ]
    for name, section in sections.items():
        if name in found:
            parts += section(found[name], path)
    path.write_text("\n\n".join(parts) + "\n")


def _origin(results: Results, timed: bool = True) -> str:
    about, others = results["machine"], results["others"]
    disturbed = "" if others is None or not timed else f"; other processes took {others:.1%} of the cores meanwhile"
    return (
        f"*{about['cpu']} ({about['instructions']}), {about['cores']} cores, {about['threads']} threads, torch "
        f"{about['torch']}, transformers {about['transformers']}; `{results['command']}`, {results['date']}{disturbed}.*"
    )


def _model(settings: Results, layers: int) -> str:
    return f"{layers} layers of hidden size {settings['hidden_size']}, vocabulary {settings['vocab_size']}"


# --- peers -----------------------------------------------------------------------------------------------------------


def peers(results: Results, path: Path) -> list[str]:
    """All contenders on one prompt."""
    settings, timings, shares = results["settings"], results["timings"], results["shares"]
    least = f"simba keep {min(settings['keeps'])}"
    rows = [
        [
            name,
            f"{shares[name]:.2f}" if name in shares else "",
            clock(timing["median"]),
            spread(timing),
            str(len(timing["runs"])),
            times(timing["median"] / timings[least]["median"]),
        ]
        for name, timing in timings.items()
    ]
    planned = [
        f"{plan['ratio']:.3f} at the FLOPs of keep {keep} ({plan['tokens'][-1]} tokens are left at the end)"
        for keep, plan in results["reduction"]["keeps"].items()
    ]
    after = ", ".join(str(layer + 1) for layer in results["reduction"]["after layers"])
    left_out = [f"- {name} did not run: {why}." for name, why in results["left out"].items()]
    return [
        "## Side by side with its peers",
        _origin(results),
        f"One prompt of {settings['tokens']} tokens, {_model(settings['sizes'], settings['layers'])}; same weights, same "
        "prompt.",
        markdown_table(["", "FLOPs of the mixers", "median", "spread", "runs", f"/ {least}"], rows),
        f"“{BARE}” are those of {least}, alone. “Token reduction” is our own implementation, for measurement only, of the "
        "method of *Rethinking Token Reduction for State Space Models* (EMNLP 2024): what was taken from the paper and "
        "what was chosen is said in `benchmarks/token_reduction.py`. Its layers run through our backend at keep 1.0, so "
        f"the same kernels work for both methods; “none” is that without any reduction. It reduces after layers {after}, "
        f"each time to this share of the tokens: {', '.join(planned)}. Those are the shares at which mixers, similarities "
        "and importances take as many operations as ours with its scores. Its similarities grow with the square of the "
        "tokens. What compiling takes is in [bench.md](../benchmarks/results/bench.md).",
        *(["\n".join(left_out)] if left_out else []),
    ]


def quality(results: Results, path: Path) -> list[str]:
    """Both methods at equal FLOPs."""
    settings = results["settings"]

    def scored(found: Results | None) -> str:
        return "" if found is None else f"{found['mean']:.3f} ({found['interval'][0]:.3f} to {found['interval'][1]:.3f})"

    rows = [
        [
            f"{row['task']}: {row['unit']}",
            str(row["keep"]),
            f"{row['ours']['share']:.2f}",
            scored(row["dense"]),
            scored(row["ours"]),
            scored(row["reduction"]),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["difference"]) if row["difference"] else "needs more FLOPs",
        ]
        for row in results["rows"]
    ]
    headings = ["", "keep", "FLOPs", "dense", "ours", "token reduction", "reduction minus ours"]
    return [
        "### What it costs in quality, at equal FLOPs",
        _origin(results, timed=False),
        f"The testbeds of [results.md](results.md): bits per byte of the last {settings['last']} bytes of windows of "
        f"held-out Python source (lower is better), and accuracy of recall in {settings['sequences']} sequences (higher is "
        "better). The positions that are scored are protected in both methods. Intervals are 95%; the difference is "
        "paired, sequence by sequence. Neither method was tuned to these models. Where the reduction “needs more FLOPs”, "
        "it takes more than ours even if it drops all that it may.",
        markdown_table(headings, rows),
        _verdict(results["rows"]),
    ]


def _verdict(rows: list[Results]) -> str:
    """How often which method is better, by the paired intervals."""
    compared = [row for row in rows if row["difference"] is not None]
    signs = []
    for row in compared:
        _, low, high = row["difference"]
        better = 1 if row["unit"] == "accuracy" else -1  # of reduction minus ours, where the reduction is better
        signs.append(better if low > 0 else -better if high < 0 else 0)
    return (
        f"Of {len(compared)} comparisons ours is better in {signs.count(-1)}, the token reduction in {signs.count(1)}; in "
        f"{signs.count(0)} the interval of the difference holds 0."
    )


# --- growth ----------------------------------------------------------------------------------------------------------


def growth(results: Results, path: Path) -> list[str]:
    """How cost grows."""
    settings = results["settings"]
    picture = path.with_name("benchmarks-growth.png")
    pictures.growth(picture, results)
    first = next(iter(settings["sizes"].values()))
    few = _model(first, settings["few"])
    parts = [
        "## How cost grows",
        _origin(results),
        f"Where a layer's cost is what is looked at, the model has {few} (24 layers at 65,536 tokens would take minutes a "
        f"run); where all layers count, {settings['many']}. Pruned is keep 0.1, medians of {settings['repeats']} runs.",
        f"![How cost grows]({picture.name})",
        "### With the prompt",
        _lengths(results["lengths"]),
        _linear(results["lengths"]),
        _stage_shares(results["lengths"]),
        f"### With the batch ({settings['batch_tokens']} tokens each)",
        _both(results["batches"], "sequences", "batch"),
        f"### With threads ({settings['tokens']} tokens)",
        _both(results["threads"], "threads", "threads"),
        f"### With the width ({settings['few']} layers of each model's width, {settings['tokens']} tokens)",
        _both(results["sizes"], "size", "size"),
        f"### With what is kept ({settings['many']} layers, {settings['tokens']} tokens)",
        _keeps(results["keeps"]),
        "### Compiling, with the layers",
        markdown_table(
            ["layers", "keep 1.0", "spread", "keep 0.1", "spread"],
            [
                [str(row["layers"])]
                + [cell for name in (DENSE, PRUNED) for cell in (clock(row[name]["median"]), spread(row[name]))]
                for row in results["depths"]
            ],
        ),
        f"### To the first token, and on ({settings['many']} layers)",
        "Time to the first token includes writing the cache. Decoding goes on from the pruned states, greedily, "
        f"{settings['decoded']} steps; it never prunes, so its speed depends on neither the prompt nor keep.",
        markdown_table(
            ["tokens", "to the first token: keep 1.0", "keep 0.1", "then, tokens a second: keep 1.0", "keep 0.1"],
            [
                [str(row["tokens"])]
                + [clock(row[name]["first token"]["median"]) for name in (DENSE, PRUNED)]
                + [f"{1 / row[name]['next token']['median']:.1f}" for name in (DENSE, PRUNED)]
                for row in results["prompts"]
            ],
        ),
    ]
    return parts


def _lengths(rows: list[Results]) -> str:
    headings = ["tokens", "keep 1.0", "keep 0.1", "spread", "faster", "µs a token", "memory: keep 1.0", "keep 0.1"]
    headings.append("score, select, gather")
    return markdown_table(
        headings,
        [
            [
                f"{row['tokens']:,}",
                clock(row[DENSE]["median"]),
                clock(row[PRUNED]["median"]),
                spread(row[PRUNED]),
                f"{row[DENSE]['median'] / row[PRUNED]['median']:.2f}×",
                f"{row[PRUNED]['median'] / row['tokens'] * 1e6:.1f}",
                f"{row['memory'][DENSE]:.0f} MiB",
                f"{row['memory'][PRUNED]:.0f} MiB",
                f"{scoring(row):.1%}",
            ]
            for row in rows
        ],
    )


def scoring(row: Results) -> float:
    """The share of a run's stages that scoring, selecting and gathering take."""
    return sum(row["stages"][stage] for stage in SCORING) / sum(row["stages"].values())


def _linear(rows: list[Results]) -> str:
    """What the lengths say, in words."""
    first, last = next(row for row in rows if row["tokens"] >= min(1024, rows[-1]["tokens"])), rows[-1]
    each = [row[PRUNED]["median"] / row["tokens"] for row in (first, last)]
    return (
        f"From {first['tokens']:,} to {last['tokens']:,} tokens, {last['tokens'] / first['tokens']:.0f} times as many, the "
        f"pruned run takes {last[PRUNED]['median'] / first[PRUNED]['median']:.1f} times as long ({each[1] / each[0]:.2f} "
        f"times for each token), and scoring, selecting and gathering go from {scoring(first):.1%} to {scoring(last):.1%} "
        "of it. Memory is the growth of the peak over one prompt, in a process of its own; the first layer keeps all "
        "tokens, so pruning does not lower the peak of a long prompt. “other” is the embedding and the head, which runs "
        "on one token."
    )


def _stage_shares(rows: list[Results]) -> str:
    cells = []
    for stage in STAGES:
        shares = [f"{row['stages'][stage] / sum(row['stages'].values()):.1%}" for row in rows]
        cells.append([stage, *shares])
    return markdown_table(["share of the pruned run", *(f"{row['tokens']:,} tokens" for row in rows)], cells)


def _both(rows: list[Results], heading: str, key: str) -> str:
    return markdown_table(
        [heading, "keep 1.0", "spread", "keep 0.1", "spread", "faster"],
        [
            [
                str(row[key]),
                clock(row[DENSE]["median"]),
                spread(row[DENSE]),
                clock(row[PRUNED]["median"]),
                spread(row[PRUNED]),
                f"{row[DENSE]['median'] / row[PRUNED]['median']:.2f}×",
            ]
            for row in rows
        ],
    )


def _keeps(rows: list[Results]) -> str:
    dense = rows[0]["time"]["median"]
    cells = [
        [str(row["keep"]), clock(row["time"]["median"]), spread(row["time"]), f"{dense / row['time']['median']:.2f}×"]
        for row in rows
    ]
    return markdown_table(["keep", "median", "spread", f"faster than keep {rows[0]['keep']}"], cells)


# --- limits ----------------------------------------------------------------------------------------------------------


def limits(results: Results, path: Path) -> list[str]:
    """Every stage against the machine."""
    settings, runs = results["settings"], results["runs"]
    picture = path.with_name("benchmarks-limits.png")
    pictures.limits(picture, results)
    whole = [
        [
            dtype,
            clock(runs[f"{dtype} keep 1.0"]["median"]),
            clock(runs[f"{dtype} keep 0.1"]["median"]),
            spread(runs[f"{dtype} keep 0.1"]),
            clock(runs[f"{dtype} products"]["median"]),
            spread(runs[f"{dtype} products"]),
            f"{runs[f'{dtype} keep 0.1']['median'] / runs[f'{dtype} products']['median']:.2f}",
        ]
        for dtype in results["stages"]
    ]
    ratios = [runs[f"float32 {what}"]["median"] / runs[f"bfloat16 {what}"]["median"] for what in ("keep 0.1", "products")]
    headings = ["", "keep 1.0", "keep 0.1", "spread", "its products alone", "spread", "keep 0.1 / products"]
    parts = [
        "## How close to what the machine can do",
        _origin(results),
        f"A prompt of {settings['tokens']} tokens, {_model(settings['sizes'], settings['layers'])}; {settings['repeats']} "
        "runs.",
        markdown_table(headings, whole),
        f"bfloat16 is {ratios[0]:.2f} times as fast as float32, and torch's matrix products alone {ratios[1]:.2f} times. "
        + (
            "What is not a product gains less, so the products bound the gain."
            if ratios[1] > 1
            else "Without instructions for bfloat16 torch converts numbers as it goes; the products that run are our own "
            "there ([kernels-cpu.md](kernels-cpu.md))."
        ),
        "Each stage of the pruned run, all layers together, in runs of its graph node by node. Its yardstick is the longer "
        "one of its bare matrix products (torch's, same shapes, nothing else) and of moving what it must read and write, "
        f"once, at the speed of a copy, {results['copy'] / 1e9:.1f} GB/s here (read and written bytes of an array much "
        "larger than the caches). It is no bound: where our own products are faster than torch's, a stage is below 1. It "
        "leaves out the exponentials of scan and score, one for each token, channel and state. The selection reads a few "
        "kilobytes a layer.",
        f"![How close to what the machine can do]({picture.name})",
    ]
    for dtype, found in results["stages"].items():
        total = sum(stage["seconds"] for stage in found.values())
        rows = [
            [
                name,
                clock(stage["seconds"]),
                f"{stage['seconds'] / total:.1%}",
                clock(stage["products"]) if stage["products"] else "",
                f"{stage['flops'] / stage['seconds'] / 1e9:.0f}" if stage["flops"] else "",
                clock(stage["bytes"] / results["copy"]),
                f"{stage['seconds'] / yardstick(stage, results['copy']):.2f}",
            ]
            for name, stage in found.items()
            if name != "other" and yardstick(stage, results["copy"]) > 0  # a stage that did not run has none
        ]
        headings = [f"{dtype}, keep 0.1", "time", "share", "bare products", "GFLOP/s", "memory", "time / yardstick"]
        parts.append(markdown_table(headings, rows))
    return parts


def yardstick(stage: dict[str, float], copy: float) -> float:
    """Seconds that a stage's bare products take, or its bytes at the speed of a copy: whichever is longer."""
    return max(stage["products"], stage["bytes"] / copy)

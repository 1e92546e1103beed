"""The pictures of docs/benchmarks.md."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from simba_compile.cli.bench_report import DENSE, PRUNED
from simba_compile.cli.plot import GRID, INK, MUTED

SPREAD = ("median", "min", "max")
LIGHT, DARK, SECOND = "#86aed4", "#12406f", "#c2662d"
GROUPS = {  # of stages, from the bottom of a bar to its top
    "matrix products": (("in_proj", "x_proj", "dt_proj", "out_proj"), "#12406f"),
    "scan": (("scan",), "#4480b8"),
    "convolution": (("conv",), "#86aed4"),
    "norm, other": (("norm", "other"), "#c6d8ea"),
    "score, select, gather": (("score", "select", "gather"), "#c2662d"),
}


def _plain(axes: Any, title: str, across: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(across, color=INK, fontsize=9)


def _lines(axes: Any, at: list[float], rows: list[dict[str, Any]], value: Any) -> None:
    """Dense and pruned, each with its spread."""
    for name, label, colour in ((DENSE, "keep 1.0", LIGHT), (PRUNED, "keep 0.1", DARK)):
        points = [value(row, row[name]) for row in rows]
        middle = [point[0] for point in points]
        reach = [[point[0] - point[1] for point in points], [point[2] - point[0] for point in points]]
        axes.errorbar(at, middle, reach, color=colour, marker="o", markersize=4, linewidth=1.5, capsize=2, label=label)
    axes.set_ylim(bottom=0)


def _ticks(axes: Any, at: list[float]) -> None:
    """A logarithmic axis with ticks at what was measured, and nowhere else."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(at)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))


def growth(path: Path, results: dict[str, Any]) -> None:
    """Draw what `growth.measure` returns."""
    figure = Figure(figsize=(11.5, 6.6), layout="constrained", dpi=150)
    panels = figure.subplots(2, 3)
    by_length, settings = results["lengths"], results["settings"]
    tokens = [row["tokens"] for row in by_length]

    axes = panels[0, 0]
    _plain(axes, f"Time for each token, {settings['few']} layers, µs", "tokens of the prompt")
    _lines(axes, tokens, by_length, lambda row, run: [run[key] / row["tokens"] * 1e6 for key in SPREAD])
    _ticks(axes, tokens)

    axes = panels[0, 1]
    _plain(axes, "Stages of the pruned run, % of its time", "tokens of the prompt")
    below = [0.0] * len(by_length)
    for label, (stages, colour) in GROUPS.items():
        share = [100 * sum(row["stages"][stage] for stage in stages) / sum(row["stages"].values()) for row in by_length]
        axes.bar(range(len(tokens)), share, bottom=below, color=colour, width=0.72, label=label)
        below = [low + more for low, more in zip(below, share, strict=True)]
    axes.set_xticks(range(len(tokens)), [f"{number:,}" for number in tokens])
    axes.set_ylim(0, 100)
    axes.grid(False)
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1, handlelength=1
    )

    axes = panels[0, 2]
    _plain(axes, "Growth of the peak of memory, MiB", "tokens of the prompt")
    for name, colour in ((DENSE, LIGHT), (PRUNED, DARK)):
        axes.plot(tokens, [row["memory"][name] for row in by_length], color=colour, marker="o", markersize=4)
    _ticks(axes, tokens)
    axes.set_yscale("log")

    axes = panels[1, 0]
    batches = [row["batch"] for row in results["batches"]]
    _plain(axes, f"Time for each sequence of {settings['batch_tokens']} tokens, ms", "sequences in the batch")
    _lines(axes, batches, results["batches"], lambda row, run: [run[key] / row["batch"] * 1e3 for key in SPREAD])
    _ticks(axes, batches)

    axes = panels[1, 1]
    _plain(axes, f"Time by keep, {settings['many']} layers, {settings['tokens']} tokens, s", "keep")
    at = [row["keep"] for row in results["keeps"]]
    timings = [row["time"] for row in results["keeps"]]
    reach = [[run["median"] - run["min"] for run in timings], [run["max"] - run["median"] for run in timings]]
    middle = [run["median"] for run in timings]
    axes.errorbar(at, middle, reach, color=DARK, marker="o", markersize=4, linewidth=1.5, capsize=2)
    axes.set_xlim(0, 1.04)
    axes.set_ylim(bottom=0)

    axes = panels[1, 2]
    _plain(axes, "Compiling, s", "layers")
    layers = [row["layers"] for row in results["depths"]]
    _lines(axes, layers, results["depths"], lambda row, run: [run[key] for key in SPREAD])
    axes.set_xlim(left=0)
    axes.set_xticks(layers)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def limits(path: Path, results: dict[str, Any]) -> None:
    """Draw what `limits.measure` returns: every stage's time as a bar, its products and its bytes as marks."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(results["stages"]), sharey=True)
    for axes, (dtype, found) in zip(panels, results["stages"].items(), strict=True):
        names = [name for name in found if name != "other"][::-1]
        _plain(axes, f"{dtype}, keep 0.1", "ms, all layers")
        axes.barh(names, [found[name]["seconds"] * 1e3 for name in names], color=LIGHT, height=0.68, label="measured")
        for place, name in enumerate(names):
            marks = (found[name]["products"], DARK), (found[name]["bytes"] / results["copy"], SECOND)
            for seconds, colour in marks:
                if seconds:
                    axes.plot([seconds * 1e3] * 2, [place - 0.4, place + 0.4], color=colour, linewidth=2.2)
        axes.plot([], [], color=DARK, linewidth=2.2, label="its bare matrix products")
        axes.plot([], [], color=SECOND, linewidth=2.2, label="its bytes at the speed of a copy")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)

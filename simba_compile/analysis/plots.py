"""The pictures of ``simba analyze`` and ``simba eval``; matplotlib is loaded only when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#222222", "#666666", "#e4e4e4"
DENSE, PRUNED = "#86aed4", "#12406f"
SECOND = "#c2662d"
COLOURS = (PRUNED, SECOND, "#4f8f5b", "#8a5aa8", "#b0a03a", "#86aed4")
WIDE = 4  # panels in a row


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def redundancy(path: Path, found: dict[str, list[dict[str, float]]], subject: str) -> None:
    """Draw what `simba_compile.analysis.redundancy.measure` returns."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    _plain(axes)
    for name, label, colour in (("ssm_states", "SSM state", PRUNED), ("hidden_states", "residual stream", SECOND)):
        adjacent = [layer["adjacent"] for layer in found[name]]
        unrelated = [layer["unrelated"] for layer in found[name]]
        at = range(1, len(adjacent) + 1)
        axes.plot(at, adjacent, color=colour, marker="o", markersize=5, label=f"{label}, adjacent tokens")
        axes.plot(at, unrelated, color=colour, linestyle="--", linewidth=1.2, label=f"{label}, unrelated tokens")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("cosine similarity", color=INK)
    axes.set_title(f"States of adjacent tokens: {subject}", loc="left", color=INK, fontsize=11)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=2)
    _save(figure, path)


def flow(path: Path, layers: Sequence[dict[str, Any]], subject: str) -> None:
    """Draw what `simba_compile.analysis.flow.measure` returns: a panel for each layer, all with one scale."""
    from matplotlib.figure import Figure

    wide = min(WIDE, len(layers))
    high = -(-len(layers) // wide)
    figure = Figure(figsize=(2.9 * wide + 0.6, 2.5 * high + 1.0), layout="constrained", dpi=150)
    panels = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False).flat
    for axes, layer in zip(panels, layers, strict=False):
        _plain(axes)
        bins = len(layer["dense"])
        at = [(i + 0.5) / bins for i in range(bins)]
        for name, label, style in (
            ("dense", "dense", {"color": DENSE}),
            ("dense_same_tokens", "dense, at the tokens kept", {"color": DENSE, "linestyle": "--", "linewidth": 1.2}),
            ("pruned", "pruned", {"color": PRUNED}),
        ):
            axes.plot(at, [point or float("nan") for point in layer[name]], label=label, **style)
        axes.set_yscale("log")
        axes.set_xlim(0, 1)
        axes.set_title(f"layer {layer['layer']}, {layer['tokens']} tokens kept", loc="left", color=INK, fontsize=9.5)
    for axes in list(panels)[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("position in the sequence", color=INK, fontsize=10)
    figure.supylabel("s(t) / ‖y_T‖, mean of the tokens", color=INK, fontsize=10)
    figure.suptitle(f"What reaches the last output: {subject}", color=INK, fontsize=11, x=0.01, ha="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", frameon=False, fontsize=9, ncols=3)
    _save(figure, path)


def evaluation(path: Path, results: Sequence[dict[str, Any]], subject: str) -> None:
    """Draw quality against keep: a panel for each length (and number of pairs), a line for each setting.

    Accuracies as they are; of bits, the paired difference to the dense model, for sequences differ from each other far more.

    Parameters
    ----------
    path : Path
    results : sequence of dict
        What `simba_compile.analysis.evaluation.evaluate` returned, for one model.
    subject : str
        What was scored.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        pairs = result["of"].get("pairs")
        title = f"{result['of']['tokens']} tokens" + (f", {pairs} pairs" if pairs else "")
        panels.setdefault(title, []).append(result)
    wide = min(WIDE, len(panels))
    high = -(-len(panels) // wide)
    width = max(2.9 * wide + 1.2, 5.5)  # of one panel, the title needs more
    figure = Figure(figsize=(width, 2.6 * high + 1.0), layout="constrained", dpi=150)
    grid = list(figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (title, found) in zip(grid, panels.items(), strict=False):
        _plain(axes)
        _keeps(axes, found)
        axes.set_title(title, loc="left", color=INK, fontsize=9.5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("keep", color=INK, fontsize=10)
    unit = results[0]["unit"]
    figure.supylabel(unit if unit == "accuracy" else f"{unit}, minus dense", color=INK, fontsize=10)
    figure.suptitle(subject, color=INK, fontsize=11, x=0.01, ha="left")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def _keeps(axes: Any, found: Sequence[dict[str, Any]]) -> None:
    """One panel: the dense model as a line across, every other setting over its keeps, with intervals."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}  # label → keep, mean, lower, upper
    least = {result["of"]["options"].get("min_tokens") for result in found} - {None}
    left_out = {"keep", "min_tokens"} if len(least) < 2 else {"keep"}
    for result in found:
        options = result["of"]["options"]
        mean, low, high = result["difference"]
        if result["unit"] == "accuracy":
            mean, (low, high) = result["mean"], result["interval"]
        if options == {"keep": 1.0}:
            axes.axhline(mean, color=MUTED, linestyle="--", linewidth=1.2, label="dense")
        else:
            label = ", ".join(_told(name, value) for name, value in options.items() if name not in left_out)
            lines.setdefault(label or "influence", []).append((options["keep"], mean, low, high))
    for colour, (label, points) in zip(COLOURS * len(lines), lines.items(), strict=False):
        at, means, lows, highs = zip(*sorted(points), strict=True)
        reach = [
            [max(0.0, mean - low) for mean, low in zip(means, lows, strict=True)],
            [max(0.0, high - mean) for mean, high in zip(means, highs, strict=True)],
        ]
        axes.errorbar(at, means, reach, color=colour, marker="o", markersize=4, linewidth=1.5, capsize=2, label=label)


def _told(name: str, value: Any) -> str:
    """An option in a legend. Criteria are named by themselves."""
    return str(value) if name == "criterion" else f"{name} {value}"

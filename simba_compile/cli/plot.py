"""The demo's picture, and whether a picture can be drawn at all; matplotlib is loaded only when one is asked for."""

import importlib.util
from pathlib import Path

import typer

from simba_compile.analysis.plots import GRID, INK, MUTED

SHADES = ("#c6d8ea", "#86aed4", "#4480b8", "#12406f")  # light to dark: the fewer tokens, the darker
LEAST_BITS, LEAST_SPEED = 0.1, 0.5  # the least that an axis spans: noise should not look like a difference


def require(picture: Path) -> None:
    """Say at once that a picture cannot be drawn, before any work is done.

    Raises
    ------
    typer.BadParameter
        Without matplotlib, and for a kind of file that it does not write.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter(
            "drawing needs matplotlib: pip install 'simba_compile[plot]', or leave --plot out.", param_hint="--plot"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kind, kinds = picture.suffix.removeprefix(".").lower(), FigureCanvasBase.get_supported_filetypes()
    if kind and kind not in kinds:
        raise typer.BadParameter(
            f"{picture} cannot be drawn: its suffix is none of {', '.join(kinds)}.", param_hint="--plot"
        )


def demo(
    path: Path,
    layers: dict[float, list[int]],
    speeds: dict[float, float],
    bits: dict[float, float],
    subject: str,
    scored: int,
) -> None:
    """Draw the tokens that each layer works on, and what pruning costs against what it gains.

    Parameters
    ----------
    path : Path
        Where the picture goes; its suffix names the format.
    layers : dict
        For each keep, the tokens left after each layer, in order.
    speeds, bits : dict
        For each keep, the speed (dense is 1) and the bits per byte.
    subject : str
        What was read.
    scored : int
        Over how many last bytes the bits were measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK)
    _trapezoid(left, layers)
    _curve(right, speeds, bits, scored)
    figure.suptitle(f"simba on {subject}", color=INK, fontsize=13, x=0.012, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _trapezoid(axes, layers: dict[float, list[int]]) -> None:  # type: ignore[no-untyped-def]
    """One layer is one bar, the first at the bottom; each keep's bars lie on those of the larger ones."""
    for shade, (keep, counts) in zip(SHADES, sorted(layers.items(), reverse=True), strict=True):
        axes.barh(range(1, len(counts) + 1), counts, height=0.86, color=shade)
        axes.annotate(
            f"{counts[-1]}",
            (counts[-1], len(counts) + 0.43),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=8.5,
        )
        axes.plot([], [], "s", color=shade, label="dense" if keep == 1 else f"keep {keep}")
    depth = len(next(iter(layers.values())))
    axes.set_yticks(range(1, depth + 1) if depth <= 12 else range(4, depth + 1, 4))
    axes.set_ylim(0.4, depth * 1.06 + 0.5)
    axes.set_xlim(0, max(layers[1.0]) * 1.01)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("layer", color=INK)
    axes.set_xlabel("tokens left after the layer", color=INK)
    axes.set_title("Tokens at each layer", loc="left", color=INK, fontsize=11, pad=26)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=len(layers),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1.4,
    )


def _curve(axes, speeds: dict[float, float], bits: dict[float, float], scored: int) -> None:  # type: ignore[no-untyped-def]
    """A point for each keep, joined in the order of keep."""
    keeps = sorted(speeds, reverse=True)
    axes.plot([speeds[k] for k in keeps], [bits[k] for k in keeps], color=MUTED, linewidth=1.2, zorder=1)
    for i, (shade, keep) in enumerate(zip(SHADES, keeps, strict=True)):
        axes.scatter(speeds[keep], bits[keep], s=80, color=shade, edgecolor=INK, linewidth=0.8, zorder=2)
        axes.annotate(
            "dense" if keep == 1 else f"keep {keep}",
            (speeds[keep], bits[keep]),
            xytext=(0, -17 if i % 2 else 10),  # neighbours may lie close together
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
        )
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.18, y=0.22)
    axes.set_xlim(_widened(axes.get_xlim(), LEAST_SPEED))
    axes.set_ylim(_widened(axes.get_ylim(), LEAST_BITS))
    axes.set_xlabel("speed (dense is 1)", color=INK)
    axes.set_ylabel(f"bits per byte of the last {scored} (lower is better)", color=INK)
    axes.set_title("Speed against quality", loc="left", color=INK, fontsize=11)


def _widened(limits: tuple[float, float], least: float) -> tuple[float, float]:
    low, high = limits
    more = max(0.0, least - (high - low)) / 2
    return low - more, high + more

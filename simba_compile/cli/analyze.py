"""``simba analyze``: what goes on inside a model when it reads a text."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from simba_compile.analysis import flow, plots, redundancy
from simba_compile.analysis.tasks import TextTask, read_text
from simba_compile.cli import models, plot
from simba_compile.cli.show import told_of
from simba_compile.options import Options


def run_redundancy(name: str, text: Sequence[Path], tokens: int, windows: int, data: Path, picture: Path | None) -> None:
    """See `simba_compile.cli.redundancy`."""
    model, ids, subject = _load(name, text, tokens, windows, picture)
    with told_of():
        found = redundancy.measure(model, ids)
    _write(data, {"model": name, "text": [path.name for path in text], "windows": list(ids.shape), **found})
    table = Table(title=f"Cosine similarity: {subject}", title_justify="left", box=SIMPLE_HEAD)
    for column in ("layer", "SSM state, adjacent", "unrelated", "residual stream, adjacent", "unrelated"):
        table.add_column(column, justify="right")
    for i, pair in enumerate(itertools.zip_longest(*found.values()), 1):
        cells = [f"{layer[which]:.3f}" if layer else "" for layer in pair for which in ("adjacent", "unrelated")]
        table.add_row(str(i), *cells)
    _finish(table, data, picture, lambda path: plots.redundancy(path, found, subject))


def run_flow(
    name: str,
    text: Sequence[Path],
    tokens: int,
    windows: int,
    data: Path,
    picture: Path | None,
    options: dict[str, Any],
    layers: Sequence[int] | None,
    bins: int,
) -> None:
    """See `simba_compile.cli.flow`."""
    model, ids, subject = _load(name, text, tokens, windows, picture)
    with told_of():
        found = flow.measure(model, ids, Options(**options), layers, bins)
    about = {"model": name, "text": [path.name for path in text], "windows": list(ids.shape), "options": options}
    _write(data, about | {"layers": found})
    title = f"Influence of the first half over that of the last tenth: {subject}, {options}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("layer", "tokens kept", "dense", "dense, at the tokens kept", "pruned"):
        table.add_column(column, justify="right")
    for layer in found:
        reaches = (flow.reach(layer[which]) for which in ("dense", "dense_same_tokens", "pruned"))
        cells = ("" if value is None else f"{value:.2g}" for value in reaches)
        table.add_row(str(layer["layer"]), str(layer["tokens"]), *cells)
    _finish(table, data, picture, lambda path: plots.flow(path, found, f"{subject}, keep {options['keep']}"))


def _load(
    name: str, text: Sequence[Path], tokens: int, windows: int, picture: Path | None
) -> tuple[PreTrainedModel, Tensor, str]:
    if picture is not None:
        plot.require(picture)
    models.quiet()
    model = models.load(name, config_only=False, dtype=torch.float32)
    try:
        read = read_text(text, name, model.config.get_text_config().vocab_size)
        ids, _ = TextTask(read, windows, 1, tokens).inputs(tokens)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error).strip().splitlines()[0], param_hint="--text") from None
    return model, ids, f"{Path(name).name} on {read.name}"


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def _finish(table: Table, data: Path, picture: Path | None, draw: Callable[[Path], None]) -> None:
    console = Console()
    console.print(table)
    if picture is not None:
        draw(picture)
    written = ", ".join(str(path) for path in (data, picture) if path is not None)
    console.print(f"Written: {written}", markup=False, highlight=False)

"""What ours and another paper's token reduction cost at equal FLOPs, on the two testbeds."""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from token_reduction import TokenReduction, flops, ratio_at
from transformers import PreTrainedModel

from simba_compile.analysis.intervals import interval, paired
from simba_compile.analysis.tasks import RecallTask, Task, Text, TextTask, read_text
from simba_compile.analysis.variants import Variants
from simba_compile.cli import models
from simba_compile.options import Options

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is scored.

    Parameters
    ----------
    keeps : tuple of float
    texts : tuple of (int, int)
        (tokens of a window, windows) of held-out text.
    recalls : tuple of (int, int)
        (tokens of a sequence, pairs in it) of recall.
    sequences : int
        Of recall.
    last : int
        Tokens scored, and protected, at the end of a window.
    """

    keeps: tuple[float, ...] = (0.5, 0.3, 0.1)
    texts: tuple[tuple[int, int], ...] = ((512, 384), (2048, 128))
    recalls: tuple[tuple[int, int], ...] = ((192, 2), (768, 2), (192, 8), (768, 8))
    sequences: int = 200
    last: int = 32

    @classmethod
    def quick(cls) -> "Settings":
        """A few sequences; the numbers mean little."""
        return cls(keeps=(0.5,), texts=((128, 2),), recalls=((96, 2),), sequences=4, last=8)


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Score both methods on the same sequences.

    Returns
    -------
    dict
        "rows": for each task, length and keep, "dense", "ours" and "reduction" with mean, interval and share of the dense
        mixers' FLOPs, and "difference", the paired mean, lower and upper end of reduction minus ours. "reduction" and
        "difference" are None where no ratio takes so few FLOPs.
    """
    models.quiet()
    text_model = models.load(str(ROOT / "models/python-bytes"), config_only=False, dtype=torch.float32)
    text = held_out(text_model.config.vocab_size)
    rows: list[dict[str, Any]] = []
    for tokens, windows in settings.texts:
        task: Task = TextTask(text, windows, settings.last, tokens)
        title = f"text, {tokens} bytes"
        rows += compare(text_model, task, title, tokens, settings.keeps, Options().min_tokens, say)
    recall_model = models.load(str(ROOT / "models/recall"), config_only=False, dtype=torch.float32)
    for tokens, pairs in settings.recalls:
        task = RecallTask(pairs, settings.sequences)
        title = f"recall, {pairs} pairs in {tokens} tokens"
        rows += compare(recall_model, task, title, tokens, settings.keeps, 8, say)
    return {"settings": dataclasses.asdict(settings), "rows": rows}


def held_out(vocabulary: int) -> Text:
    """The text that the byte model has not seen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "held-out.txt"
        with path.open("wb") as file:
            subprocess.run([sys.executable, ROOT / "training/corpus.py"], stdout=file, check=True)
        return read_text([path], "", vocabulary)


def compare(
    model: PreTrainedModel,
    task: Task,
    title: str,
    tokens: int,
    keeps: tuple[float, ...],
    min_tokens: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one task at one length: see `measure`."""
    variants, reducing = Variants(model), TokenReduction(model)  # type: ignore[arg-type]
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    ids, targets = task.inputs(tokens)

    def scored(logits: Any) -> list[float]:
        values: list[float] = []
        for part in logits:
            values += task.values(part, targets[len(values) : len(values) + len(part)])
        return values

    say(f"quality: {title}, dense")
    dense_values = scored(variants.logits(Options(keep=1.0), ids, task.last))
    dense, _ = variants.flops(tokens)
    per_token = dense / layers / tokens
    rows = []
    for keep in keeps:
        say(f"quality: {title}, keep {keep}")
        values = scored(variants.logits(Options(keep=keep, min_tokens=min_tokens), ids, task.last))
        _, budget = variants.flops(tokens)
        row: dict[str, Any] = {
            "task": title,
            "unit": task.unit,
            "keep": keep,
            "dense": _summary(dense_values, 1.0),
            "ours": _summary(values, budget / dense),
            "reduction": None,
            "difference": None,
        }
        found = ratio_at(budget, tokens, layers, task.last, per_token, hidden)
        if found is not None:
            others = scored(reducing.logits(ids, found, task.last))
            spent = flops(tokens, layers, found, task.last, per_token, hidden)
            row["reduction"] = _summary(others, spent / dense) | {"ratio": found}
            row["difference"] = paired(others, values)
        rows.append(row)
    return rows


def _summary(values: list[float], share: float) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "interval": interval(values), "share": share}

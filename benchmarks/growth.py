"""How cost grows: with the prompt, the batch, what is kept, threads, the model's width and its depth; and decoding after."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import stages
import torch
from transformers import PreTrainedModel

from simba_compile.cli import models
from simba_compile.cli.bench import compile_model, memory
from simba_compile.cli.bench_report import DENSE, PRUNED
from simba_compile.cli.timing import Timing, seconds, side_by_side

KEEP = 0.1
CALL: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is varied, and the rest.

    Parameters
    ----------
    sizes : dict of str to dict
        Models' widths by name; the first is used wherever width is not what varies.
    few, many : int
        Layers: `few` where a layer's cost is what is looked at (24 layers at 65,536 tokens take minutes), `many` where all
        count.
    tokens, batch_tokens : int
        Length of the prompt, where it is not what varies; of each sequence of a batch.
    lengths, batches, threads, depths : tuple of int
    keeps : tuple of float
    prompts : tuple of int
        Lengths of prompts before decoding.
    decoded : int
        Steps of decoding.
    repeats : int
        Runs of everything.
    """

    sizes: dict[str, dict[str, Any]] = dataclasses.field(
        default_factory=lambda: {
            "130m": models.MAMBA_130M,
            "370m": models.MAMBA_130M | {"hidden_size": 1024},
            "790m": models.MAMBA_130M | {"hidden_size": 1536},
        }
    )
    few: int = 4
    many: int = 24
    tokens: int = 2048
    batch_tokens: int = 1024
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    keeps: tuple[float, ...] = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
    threads: tuple[int, ...] = (1, 2)
    depths: tuple[int, ...] = (4, 8, 16, 24, 48)
    prompts: tuple[int, ...] = (512, 2048, 8192)
    decoded: int = 32
    repeats: int = 3

    @classmethod
    def quick(cls) -> "Settings":
        """Sizes at which everything runs within seconds; the numbers mean nothing."""
        return cls(
            sizes={"tiny": models.TINY, "tiny, wider": models.TINY | {"hidden_size": 96}},
            few=1,
            many=2,
            tokens=96,
            batch_tokens=64,
            lengths=(64, 128),
            batches=(1, 2),
            keeps=(1.0, 0.5),
            threads=(1,),
            depths=(1, 2),
            prompts=(64,),
            decoded=2,
            repeats=2,
        )

    @property
    def first(self) -> dict[str, Any]:
        """The widths used wherever width is not what varies."""
        return next(iter(self.sizes.values()))


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything.

    Returns
    -------
    dict
        For each of "lengths", "batches", "keeps", "threads", "sizes", "depths" and "prompts" a list of rows: what varied,
        and what was measured, a `Timing` as data in seconds.
    """
    results: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
    with torch.no_grad():
        model = models.random_mamba(settings.few, settings.first)
        results["lengths"] = lengths(model, settings, say)
        results["batches"] = batches(model, settings, say)
        results["threads"] = threads(model, settings, say)
        results["sizes"] = sizes(settings, say)
        model = models.random_mamba(settings.many, settings.first)
        results["keeps"] = keeps(model, settings, say)
        results["prompts"] = prompts(model, settings, say)
        del model
        results["depths"] = depths(settings, say)
    return results


def both(model: PreTrainedModel) -> dict[str, Callable[..., Any]]:
    """The dense and the pruned model, compiled."""
    torch._dynamo.reset()
    return {name: compile_model(name, model) for name in (DENSE, PRUNED)}


def timed(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Warm up, and time in turns."""
    for call in calls.values():
        call()
    return {name: timing.to_dict() for name, timing in side_by_side(calls, dict.fromkeys(calls, repeats)).items()}


def lengths(model: PreTrainedModel, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over the length: time, growth of the peak of memory, and the seconds of each stage of the pruned run."""
    rows = []
    for tokens in settings.lengths:
        say(f"growth: {tokens} tokens")
        ids = models.random_ids(settings.first["vocab_size"], tokens)
        compiled = both(model)
        row: dict[str, Any] = {"tokens": tokens}
        row |= timed({name: functools.partial(run, ids, **CALL) for name, run in compiled.items()}, settings.repeats)
        row["stages"] = stages.seconds(stages.clock(model, ids, {"keep": KEEP}, settings.repeats))
        row["memory"] = {name: memory(name, settings.few, tokens, settings.first)["growth_mib"] for name in (DENSE, PRUNED)}
        rows.append(row)
    return rows


def batches(model: PreTrainedModel, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over the number of sequences."""
    rows = []
    compiled = both(model)
    for batch in settings.batches:
        say(f"growth: {batch} sequences")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(settings.first["vocab_size"], (batch, settings.batch_tokens), generator=generator)
        calls = {name: functools.partial(run, ids, **CALL) for name, run in compiled.items()}
        rows.append({"batch": batch, **timed(calls, settings.repeats)})
    return rows


def threads(model: PreTrainedModel, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over torch's threads."""
    rows, before = [], torch.get_num_threads()
    compiled = both(model)
    ids = models.random_ids(settings.first["vocab_size"], settings.tokens)
    for number in settings.threads:
        say(f"growth: {number} threads")
        torch.set_num_threads(number)
        calls = {name: functools.partial(run, ids, **CALL) for name, run in compiled.items()}
        rows.append({"threads": number, **timed(calls, settings.repeats)})
    torch.set_num_threads(before)
    return rows


def sizes(settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over the width."""
    rows = []
    for name, widths in settings.sizes.items():
        say(f"growth: width of {name}")
        model = models.random_mamba(settings.few, widths)
        ids = models.random_ids(widths["vocab_size"], settings.tokens)
        calls = {kind: functools.partial(run, ids, **CALL) for kind, run in both(model).items()}
        rows.append({"size": name, "hidden": widths["hidden_size"], **timed(calls, settings.repeats)})
    return rows


def keeps(model: PreTrainedModel, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over what is kept; all in turns."""
    say("growth: keeps")
    ids = models.random_ids(settings.first["vocab_size"], settings.tokens)
    torch._dynamo.reset()
    calls = {}
    for keep in settings.keeps:
        options: dict[str, Any] = {"keep": keep}
        calls[str(keep)] = functools.partial(torch.compile(model, backend="simba", options=options), ids, **CALL)
    timings = timed(calls, settings.repeats)
    return [{"keep": keep, "time": timings[str(keep)]} for keep in settings.keeps]


def prompts(model: PreTrainedModel, settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over the prompt's length: time to the first token, cache included, and the tokens a second that follow."""
    rows = []
    for tokens in settings.prompts:
        say(f"growth: a prompt of {tokens} tokens, then decoding")
        ids = models.random_ids(settings.first["vocab_size"], tokens)
        row: dict[str, Any] = {"tokens": tokens}
        runs: dict[str, tuple[list[float], list[float]]] = {}
        for name, run in both(model).items():
            generate(run, ids, 2)
            runs[name] = [], []
            for _ in range(settings.repeats):
                for taken, new in zip(runs[name], generate(run, ids, settings.decoded), strict=True):
                    taken.append(new)
        for name, (first, each) in runs.items():
            row[name] = {"first token": Timing(tuple(first)).to_dict(), "next token": Timing(tuple(each)).to_dict()}
        rows.append(row)
    return rows


def generate(run: Callable[..., Any], ids: torch.Tensor, decoded: int) -> tuple[float, float]:
    """Greedy decoding: seconds to the first token, and for each of the next ones."""
    begin = time.perf_counter()
    output = run(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    first = time.perf_counter() - begin
    cache = models.going_on(output)
    begin = time.perf_counter()
    for _ in range(decoded):
        token = run(token, **cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return first, (time.perf_counter() - begin) / decoded


def depths(settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Over the layers: the seconds of a first call beyond those of a second one."""
    rows = []
    for layers in settings.depths:
        say(f"growth: compiling {layers} layers")
        model = models.random_mamba(layers, settings.first)
        ids = models.random_ids(settings.first["vocab_size"], 64)
        row: dict[str, Any] = {"layers": layers}
        for name in (DENSE, PRUNED):
            compiling = []
            for _ in range(settings.repeats):
                torch._dynamo.reset()
                call = functools.partial(compile_model(name, model), ids, **CALL)
                compiling.append(seconds(call) - seconds(call))
            row[name] = Timing(tuple(compiling)).to_dict()
        rows.append(row)
    return rows

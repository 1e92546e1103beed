"""How close each stage is to what the machine can do: bare matrix products, and memory at the speed of a copy."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import stages
import torch
import torch.nn.functional as F

import simba_compile
from simba_compile.cli import models
from simba_compile.cli.bench import bare_products
from simba_compile.cli.timing import seconds, side_by_side

KEEP = 0.1
CALL: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large, and how often.

    Parameters
    ----------
    sizes : dict
        The model's widths.
    layers, tokens, repeats : int
    copied : int
        Bytes of the array that is copied: far more than caches hold.
    """

    sizes: dict[str, Any] = dataclasses.field(default_factory=lambda: models.MAMBA_130M)
    layers: int = 24
    tokens: int = 2048
    repeats: int = 7
    copied: int = 2**29

    @classmethod
    def quick(cls) -> "Settings":
        """Sizes at which everything runs within seconds; the numbers mean nothing."""
        return cls(models.TINY, layers=2, tokens=128, repeats=2, copied=2**20)


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure whole runs in turns, then their stages.

    Returns
    -------
    dict
        "copy", bytes a second; "runs", for each dtype the `Timing`, as data, of ours dense and pruned and of the pruned
        one's bare products; "stages", for each dtype and stage "seconds", "bytes", "products" (seconds of the bare products
        of its shapes) and "flops" of these.
    """
    of_dtype = {name: models.random_mamba(settings.layers, settings.sizes) for name in DTYPES}
    for name, dtype in DTYPES.items():
        of_dtype[name].to(dtype=dtype)  # type: ignore[call-arg]
    ids = models.random_ids(settings.sizes["vocab_size"], settings.tokens)
    mixers = simba_compile.explain(of_dtype["float32"], ids, options={"keep": KEEP}, **CALL).to_dict()["mixers"]
    torch._dynamo.reset()
    calls: dict[str, Callable[[], object]] = {}
    for name, typed in of_dtype.items():
        for keep in (1.0, KEEP):
            options: dict[str, Any] = {"keep": keep}
            compiled = torch.compile(typed, backend="simba", options=options)
            calls[f"{name} keep {keep}"] = functools.partial(compiled, ids, **CALL)
        calls[f"{name} products"] = bare_products(typed, mixers)
    results: dict[str, Any] = {"settings": dataclasses.asdict(settings), "stages": {}}
    with torch.no_grad():
        for name, call in calls.items():
            say(f"limits: first run of {name}")
            call()
        say("limits: whole runs")
        timings = side_by_side(calls, dict.fromkeys(calls, settings.repeats))
        results["runs"] = {name: timing.to_dict() for name, timing in timings.items()}
        say("limits: a copy")
        results["copy"] = copy_speed(settings.copied, settings.repeats)
        for name, typed in of_dtype.items():
            say(f"limits: stages in {name}")
            results["stages"][name] = by_stage(typed, ids, settings.repeats)
    return results


def copy_speed(size: int, repeats: int) -> float:
    """Bytes a second, read and written, of the fastest of some copies of an array (as STREAM counts them)."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(repeats))


def by_stage(model: Callable, ids: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """What each stage takes, beside its products alone: see `measure`."""
    runs = stages.clock(model, ids, {"keep": KEEP}, repeats)
    taken = stages.seconds(runs)
    found: dict[str, dict[str, float]] = {}
    dtype = next(model.parameters()).dtype  # type: ignore[attr-defined]
    for stage in stages.STAGES:
        nodes = [node for node in runs[0] if node.stage == stage]
        shapes = [node.product for node in nodes if node.product is not None]
        found[stage] = {
            "seconds": taken[stage],
            "bytes": sum(node.bytes for node in nodes),
            "flops": sum(2 * rows * inner * columns for rows, inner, columns in shapes),
            "products": bare(shapes, dtype, repeats),
        }
    return found


def bare(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int) -> float:
    """The median seconds of matrix products of these shapes, one after another, each with a weight of its own."""
    if not shapes:
        return 0.0
    inputs = [(torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)) for rows, inner, columns in shapes]

    def run() -> None:
        for x, weight in inputs:
            F.linear(x, weight)

    run()
    return statistics.median(seconds(run) for _ in range(repeats))

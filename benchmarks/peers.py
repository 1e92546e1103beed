"""One prompt, all contenders in turns: Hugging Face's own ways, another paper's token reduction, and ours."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from token_reduction import TokenReduction, counts, flops, places, ratio_at

import simba_compile
from simba_compile.cli import models
from simba_compile.cli.bench import bare_products
from simba_compile.cli.bench_report import BARE, EAGER, INDUCTOR
from simba_compile.cli.timing import side_by_side

MAMBAPY = "HF with mambapy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large, and how often.

    Parameters
    ----------
    sizes : dict
        The model's widths.
    layers, tokens : int
    repeats, slow_repeats, mambapy_repeats : int
        Runs of each contender; of Hugging Face's own, which take many seconds; of that with mambapy, which takes longest.
    keeps : tuple of float
        What ours keeps. The other paper's reduction runs at the FLOPs of each.
    inductor : bool
        Whether Hugging Face's model compiled with Inductor takes part: compiling it takes minutes.
    """

    sizes: dict[str, Any] = dataclasses.field(default_factory=lambda: models.MAMBA_130M)
    layers: int = 24
    tokens: int = 2048
    repeats: int = 5
    slow_repeats: int = 2
    mambapy_repeats: int = 1
    keeps: tuple[float, ...] = (0.5, 0.3, 0.1)
    inductor: bool = True

    @classmethod
    def quick(cls) -> "Settings":
        """Sizes at which everything runs within seconds; the numbers mean nothing."""
        return cls(models.TINY, layers=2, tokens=128, repeats=2, slow_repeats=1, inductor=False)


def ours(keep: float) -> str:
    """What ours is called."""
    return f"simba keep {keep}"


def reduction(keep: float | None) -> str:
    """What the other paper's token reduction is called, at the FLOPs of ours or without any."""
    return "token reduction, none" if keep is None else f"token reduction, FLOPs of keep {keep}"


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Time every contender on the same weights and the same prompt.

    Returns
    -------
    dict
        "timings", a `Timing` for each contender as data; "shares", of the dense mixers' FLOPs; "reduction", the places of
        the other paper's method, and for each keep its ratio and the tokens after each layer; "left out", contenders that
        did not run, and why.
    """
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    model = models.random_mamba(settings.layers, settings.sizes)
    ids = models.random_ids(settings.sizes["vocab_size"], settings.tokens)
    calls: dict[str, Callable[[], object]] = {EAGER: functools.partial(model, ids, **call)}
    left_out = {"mamba-ssm": "its kernels need CUDA"}
    if settings.inductor:
        # Static: code of its own for each length is Inductor's best case.
        calls[INDUCTOR] = functools.partial(torch.compile(model, backend="inductor", dynamic=False), ids, **call)
    else:
        left_out[INDUCTOR] = "left out by --skip-inductor or --quick"
    if importlib.util.find_spec("mambapy") is None:
        left_out[MAMBAPY] = "not installed: pip install 'simba_compile[peers]'"
    else:
        # The same seed, and so the same weights.
        same = models.random_mamba(settings.layers, settings.sizes | {"use_mambapy": True})
        calls[MAMBAPY] = functools.partial(same, ids, **call)

    reports = {keep: simba_compile.explain(model, ids, options={"keep": keep}, **call) for keep in (1.0, *settings.keeps)}
    torch._dynamo.reset()
    dense = reports[1.0].flops_dense
    hidden, per_token = settings.sizes["hidden_size"], dense / settings.layers / settings.tokens
    shares = {ours(keep): report.flops_pruned / dense for keep, report in reports.items()}
    reducing, planned = TokenReduction(model), {}
    shares[reduction(None)] = 1.0
    calls[reduction(None)] = functools.partial(reducing, ids, 1.0, 1)
    for keep in settings.keeps:
        ratio = ratio_at(reports[keep].flops_pruned, settings.tokens, settings.layers, 1, per_token, hidden)
        if ratio is None:
            left_out[reduction(keep)] = "no ratio takes so few FLOPs"
            continue
        calls[reduction(keep)] = functools.partial(reducing, ids, ratio, 1)
        spent = flops(settings.tokens, settings.layers, ratio, 1, per_token, hidden)
        shares[reduction(keep)] = spent / dense
        planned[str(keep)] = {"ratio": ratio, "tokens": counts(settings.tokens, settings.layers, ratio, 1)}
    for keep in (1.0, *settings.keeps):
        options: dict[str, Any] = {"keep": keep}
        compiled = torch.compile(model, backend="simba", options=options)
        calls[ours(keep)] = functools.partial(compiled, ids, **call)
    calls[BARE] = bare_products(model, reports[min(settings.keeps)].to_dict()["mixers"])

    with torch.no_grad():
        for name, run in calls.items():
            if name not in (EAGER, MAMBAPY):  # nothing to compile, and slow
                say(f"peers: first run of {name}")
                run()
        slow = {EAGER: settings.slow_repeats, INDUCTOR: settings.slow_repeats, MAMBAPY: settings.mambapy_repeats}
        repeats = {name: slow.get(name, settings.repeats) for name in calls}
        timings = side_by_side(calls, repeats, lambda name: say(f"peers: {name}"))
    return {
        "settings": dataclasses.asdict(settings),
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "shares": shares,
        "reduction": {"after layers": places(settings.layers), "keeps": planned},
        "left out": left_out,
    }

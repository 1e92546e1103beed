"""``simba bench``: ours and Hugging Face's, eager and with Inductor, in turns, in one run."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

import simba_compile
from simba_compile.cli import bench_report, machine, models
from simba_compile.cli.bench_report import BARE, DENSE, EAGER, INDUCTOR, PRUNED
from simba_compile.cli.show import Steps
from simba_compile.cli.timing import Timing, seconds, side_by_side

KEEP = 0.1
SLOW_REPEATS = 3  # of Hugging Face's own, which take many seconds each
DECODED = 16  # steps in one decoding run
PROMPT_BEFORE_DECODING = 16  # a step's cost does not depend on it: the state has one size
SCORING = ("influence", "select", "gather")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large, and how often.

    Parameters
    ----------
    layers, tokens : int
        Of the model and of the prompt.
    repeats : int
        Runs of each contender; Hugging Face's own run at most `SLOW_REPEATS` times.
    threads : int or None
        Threads of torch; None leaves them alone.
    inductor : bool
        Whether Hugging Face's model compiled with Inductor takes part.
    tiny : bool
        A model of hidden size 64 and 256 vocabulary entries instead of mamba-130m's.
    """

    layers: int
    tokens: int
    repeats: int
    threads: int | None
    inductor: bool
    tiny: bool = False

    @classmethod
    def quick(cls, threads: int | None, inductor: bool) -> "Settings":
        """Sizes at which everything runs within seconds; the numbers mean nothing."""
        return cls(layers=2, tokens=128, repeats=2, threads=threads, inductor=inductor, tiny=True)

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's widths."""
        return models.TINY if self.tiny else models.MAMBA_130M

    def repeats_of(self, name: str) -> int:
        """How often this contender runs."""
        return min(self.repeats, SLOW_REPEATS) if name in (EAGER, INDUCTOR) else self.repeats


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Show Inductor nothing of earlier runs, for the rest of the process: that would hide how long it compiles."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        yield


def run(settings: Settings, out: Path, command: str) -> None:
    """See `simba_compile.cli.bench`."""
    out.mkdir(parents=True, exist_ok=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    models.quiet()
    with empty_cache():
        results = measure(settings)
    results["command"] = command
    (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "bench.md").write_text(bench_report.markdown(results))
    console = Console()
    bench_report.show(results, console)
    console.print(f"Written: {out / 'bench.json'}, {out / 'bench.md'}", markup=False, highlight=False)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything.

    Returns
    -------
    dict
        "machine", "settings", "date"; "prefill" and "decode" with a `Timing` for each contender as data, that of a
        compiled one with the seconds of its "compile"; "scoring", the share of the pruned run that the operators of the
        score take; "memory", growth of the peak for each contender in MiB; "failed", contenders that did not run.
    """
    contenders = [EAGER, *([INDUCTOR] if settings.inductor else []), DENSE, PRUNED, BARE]
    prefill_runs = sum(settings.repeats_of(name) for name in contenders)
    decode_runs = sum(settings.repeats for name in contenders if name not in (DENSE, BARE))
    compiled = 2 + settings.inductor  # DENSE, PRUNED; when decoding, PRUNED alone
    with torch.no_grad(), Steps(2 + 2 * compiled - 1 + prefill_runs + decode_runs + 1 + 3) as steps:
        steps.next(f"making the model: {settings.layers} layers, hidden {settings.sizes['hidden_size']}")
        model = models.random_mamba(settings.layers, settings.sizes)
        ids = models.random_ids(settings.sizes["vocab_size"], settings.tokens)
        failed: dict[str, str] = {}
        results: dict[str, Any] = {
            "machine": machine.describe(),
            "settings": dataclasses.asdict(settings) | settings.sizes,
            "date": machine.now(),
        }
        results["prefill"], results["scoring"] = _prefill(steps, model, ids, settings, failed)
        decoding = [name for name in contenders if name not in (DENSE, BARE) and name not in failed]
        results["decode"] = time_steps(model, ids, decoding, settings.repeats, failed, steps.next)
        results["failed"] = failed
        del model
        results["memory"] = {}
        for name in (EAGER, DENSE, PRUNED):
            steps.next(f"memory of {name}, in a process of its own")
            results["memory"][name] = memory(name, settings.layers, settings.tokens, settings.sizes)
    results["targets"] = bench_report.targets(results)
    return results


def compile_model(name: str, model: PreTrainedModel, dynamic: bool | None = False) -> Callable[..., Any]:
    """The model as this contender runs it; Inductor's, unless told otherwise, with code for each length: its best case."""
    if name == EAGER:
        return model
    if name == INDUCTOR:
        return torch.compile(model, backend="inductor", dynamic=dynamic)
    options: dict[str, Any] = {"keep": KEEP if name == PRUNED else 1.0}
    return torch.compile(model, backend="simba", options=options)


def _prefill(
    steps: Steps, model: PreTrainedModel, ids: Tensor, settings: Settings, failed: dict[str, str]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Time the prompt, up to the logits of the next token, and take the pruned run's profile."""
    steps.next("counting the tokens left at each layer")
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    report = simba_compile.explain(model, ids, options={"keep": KEEP}, **call).to_dict()
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    torch._dynamo.reset()
    for name in (EAGER, INDUCTOR, DENSE, PRUNED):
        if name == INDUCTOR and not settings.inductor:
            continue
        forward = compile_model(name, model)
        calls[name] = functools.partial(forward, ids, **call)
        if name != EAGER:
            steps.next(f"compiling {name}")
            first_call(name, calls, first, failed)
    calls[BARE] = bare_products(model, report["mixers"])
    calls[BARE]()
    repeats = {name: settings.repeats_of(name) for name in calls}
    timings = side_by_side(calls, repeats, lambda name: steps.next(f"prompt: {name}"))
    steps.next("taking the profile of the pruned run")
    scoring = _scoring(calls[PRUNED], settings.repeats)
    return as_data(timings, first), scoring


def bare_products(model: PreTrainedModel, mixers: list[dict[str, Any]]) -> Callable[[], None]:
    """The matrix products of the pruned model alone: its own weights, in its order, on as many tokens."""
    products: list[tuple[Tensor, Tensor]] = []
    blocks: Any = model.base_model.layers
    for block, mixer in zip(blocks, mixers, strict=True):
        at = block.mixer
        for linear in (at.in_proj, at.x_proj, at.dt_proj):
            products.append((torch.randn(1, mixer["tokens_in"], linear.in_features).to(linear.weight), linear.weight))
        out = at.out_proj
        products.append((torch.randn(1, mixer["tokens_out"], out.in_features).to(out.weight), out.weight))
    head: Any = model.get_output_embeddings()
    products.append((torch.randn(1, 1, head.in_features).to(head.weight), head.weight))

    def run_products() -> None:
        for x, weight in products:
            F.linear(x, weight)

    return run_products


def _scoring(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """The share of a run that each operator of the score takes, and of all of them; medians."""
    shares: dict[str, list[float]] = {name: [] for name in (*SCORING, "share")}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself each time
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as taken, record_function("simba bench"):
            call()
        spent = {event.key: event.cpu_time_total for event in taken.key_averages()}
        for name in SCORING:
            shares[name].append(spent.get(f"simba::{name}", 0.0) / spent["simba bench"])
        shares["share"].append(sum(shares[name][-1] for name in SCORING))
    return {name: Timing(tuple(values)).median for name, values in shares.items()}


def time_steps(
    model: PreTrainedModel,
    ids: Tensor,
    contenders: list[str],
    repeats: int,
    failed: dict[str, str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time one-token steps. Every contender goes on from a cache of its own that eager mode filled.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor
        (1, tokens), of which the first `PROMPT_BEFORE_DECODING` fill the cache.
    contenders : list of str
        Of `EAGER`, `INDUCTOR` and `PRUNED`.
    repeats : int
        Runs, each of `DECODED` steps.
    failed : dict
        Takes the reason where Inductor cannot compile.
    say : callable
        Is told what comes next.

    Returns
    -------
    dict
        For each contender its `Timing` of one step as data.
    """
    torch._dynamo.reset()
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for name in contenders:
        cache = models.going_on(model(ids[:, :PROMPT_BEFORE_DECODING], use_cache=True))
        forward = compile_model(name, model, dynamic=None)  # a cache of attention grows
        calls[name] = functools.partial(forward, ids[:, -1:], **cache, use_cache=True)
        if name != EAGER:
            say(f"compiling a decoding step of {name}")
            first_call(name, calls, first, failed)
    runs = {name: functools.partial(_repeat, call) for name, call in calls.items()}
    for decode in runs.values():
        decode()
    timings = side_by_side(runs, dict.fromkeys(runs, repeats), lambda name: say(f"decoding: {name}"))
    each = {name: Timing(tuple(run / DECODED for run in timing.runs)) for name, timing in timings.items()}
    return as_data(each, first)


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(DECODED):
        step()


def first_call(name: str, calls: dict[str, Callable[[], object]], first: dict[str, float], failed: dict[str, str]) -> None:
    """Compile a contender; the others go on without Inductor where it cannot (no C++ compiler, say)."""
    try:
        first[name] = seconds(calls[name])
    except Exception as error:
        if name != INDUCTOR:
            raise
        failed[name] = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        del calls[name]


def as_data(timings: dict[str, Timing], first: dict[str, float]) -> dict[str, Any]:
    """Timings as data; with "compile", what the first call took beyond a later one, for those whose first call was timed."""
    data: dict[str, Any] = {name: timing.to_dict() for name, timing in timings.items()}
    for name in first.keys() & data.keys():
        data[name]["compile"] = max(0.0, first[name] - timings[name].median)
    return data


def memory(name: str, layers: int, tokens: int, sizes: dict[str, int]) -> dict[str, float]:
    """What `simba_compile.cli.memory` measures of a contender, in a process of its own."""
    request = {"name": name, "layers": layers, "tokens": tokens, "sizes": sizes, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "simba_compile.cli.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])

"""``simba bench --device cuda``: kernels and models on a GPU, within a given time.

The jobs run in a process of their own (`bench_gpu_worker`), one after the other, the most telling ones first. A job that
fails is noted and the next one goes on; where the process dies (of a bad address on the GPU, say) or a job takes too long, a
new process goes on with the job after it. What does not fit into the time that is left is skipped, with the reason. The
results are written after each job: what was measured is there, whatever ends the benchmark.
"""

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from simba_compile.cli import bench_gpu_report, machine
from simba_compile.cli.show import Steps

HF, INDUCTOR, MAMBA_SSM, GRAPH, REDUCED = "HF", "HF Inductor", "mamba-ssm", "CUDA graph", "reduce-overhead"
INNER = "Inductor"  # as what compiles the rest of our graph
DENSE, HALF, PRUNED = "simba keep 1.0", "simba keep 0.5", bench_gpu_report.FASTER
BUDGET = 480.0  # seconds for everything
SHARE = 0.2  # of it that one job may take at most
INDUCTOR_LAYERS = 2  # what this takes Inductor says whether there is time for a model of full depth
WORKER = (sys.executable, "-m", "simba_compile.cli.bench_gpu_worker")

Job = dict[str, Any]


def keep_of(contender: str) -> float:
    """The share that one of our contenders keeps."""
    return float(contender.split()[2].rstrip(","))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Parameters
    ----------
    device : {"cuda", "cpu"}
        The CPU is there so that tests can run it all.
    models : dict
        Models by name, the smallest first: fields of Hugging Face's MambaConfig.
    tokens : sequence of int
        Lengths of prompts, rising.
    kernels : dict
        The shape of the timed kernels: "channels" and "states".
    scans : sequence of (int, int)
        Batch and tokens at which the scan and its score are timed.
    wide : (int, int)
        Batch and tokens at which kernels as wide as the timed ones are held against their definitions.
    far : (int, int)
        Batch and tokens at which the channels are more than 2³¹ numbers.
    runs : int
        Of each contender.
    inductor : bool
        Whether Hugging Face's model compiled with Inductor takes part.
    budget : float
        Seconds.
    megabytes : int
        What is copied to measure the memory's bandwidth.
    """

    device: str
    models: dict[str, dict[str, int]]
    tokens: Sequence[int]
    kernels: dict[str, int]
    scans: Sequence[tuple[int, int]]
    wide: tuple[int, int]
    far: tuple[int, int]
    runs: int
    inductor: bool
    budget: float = BUDGET
    megabytes: int = 1024

    @classmethod
    def full(cls, device: str, runs: int, inductor: bool) -> "Settings":
        """The sizes of the published models."""
        widths = {"mamba-130m": (768, 24), "mamba-1.4b": (2048, 48), "mamba-2.8b": (2560, 64)}
        sizes = {name: model_of(hidden, layers, 50280) for name, (hidden, layers) in widths.items()}
        scans = ((1, 2048), (1, 8192), (1, 65536), (2, 8192), (8, 2048), (8, 8192), (8, 65536))
        kernels = {"channels": 5120, "states": 16}
        return cls(device, sizes, (2048, 8192, 32768), kernels, scans, (2, 520), (14, 32768), runs, inductor)

    @classmethod
    def quick(cls, device: str, inductor: bool) -> "Settings":
        """Sizes at which everything runs within a minute; the numbers mean nothing."""
        kernels = {"channels": 64, "states": 16}
        tiny = {"tiny": model_of(64, 2, 256)}
        return cls(device, tiny, (64, 128), kernels, ((1, 64), (2, 128)), (2, 70), (3, 64), 2, inductor, megabytes=1)


def model_of(hidden: int, layers: int, vocabulary: int) -> dict[str, int]:
    """The fields of a Mamba's configuration."""
    return {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "state_size": 16}


def jobs_of(settings: Settings) -> list[Job]:
    """Everything that is to be measured, the most telling first."""
    from simba_compile.cli.bench_kernels import CASES, HALF_AS_WIDE, OF_PROMPTS, SMALL, TYPES

    jobs: list[Job] = [{"kind": "copy", "megabytes": settings.megabytes}]
    jobs += [{"kind": "correct", "operator": name, "dtype": dtype, **SMALL} for name in CASES for dtype in TYPES]
    batch, tokens = settings.wide
    wide = {"batch": batch, "tokens": tokens, **settings.kernels}
    jobs += [{"kind": "correct", "operator": name, "dtype": "bfloat16", **wide} for name in CASES]
    jobs += [{"kind": "agree", "contender": way} for way in ("eager", GRAPH)]
    batch, tokens = settings.far
    for name in OF_PROMPTS:
        longer = tokens * (2 if name in HALF_AS_WIDE else 1)
        jobs.append({"kind": "far", "operator": name, "batch": batch, "tokens": longer, **settings.kernels})
    for name in CASES:
        if name.endswith("_backward"):  # a prompt has none
            continue
        shapes = [settings.scans[1], settings.scans[-2]] if name in OF_PROMPTS else [settings.scans[1]]
        if name in ("selective_scan", "influence"):
            shapes = list(settings.scans)
        jobs += [{"kind": "kernel", "operator": name, "batch": b, "tokens": t, **settings.kernels} for b, t in shapes]
    names = list(settings.models)
    ends = list(dict.fromkeys([names[0], names[-1]]))  # of the range of sizes: they come first
    models = [settings.models[name] for name in dict.fromkeys([*ends, *names])]
    some = {"kind": "prefill", "tokens": settings.tokens[0]}
    for model in models[: len(ends)]:
        jobs += _of_model(settings, model)
        jobs.append({"kind": "profile", "contender": PRUNED, "model": model, "tokens": settings.tokens[1]})
    if settings.inductor:
        jobs += [{"kind": "agree", "contender": way} for way in (INNER, REDUCED)]
        with_inductor = (f"{PRUNED}, {INNER}", INDUCTOR)
        shallow = [model | {"num_hidden_layers": INDUCTOR_LAYERS} for model in models[: len(ends)]]
        for model in shallow:
            jobs += [some | {"contender": one, "model": model} for one in (DENSE, PRUNED, HF, *with_inductor)]
        if shallow[0] != models[0]:
            jobs += [some | {"contender": one, "model": models[0]} for one in with_inductor]
    for model in models[len(ends) :]:
        jobs += _of_model(settings, model)
    for model in models:  # last, for these take minutes
        if settings.device == "cuda":
            jobs.append({"kind": "decode", "contender": MAMBA_SSM, "model": model})
        jobs += [{"kind": "prefill", "contender": HF, "model": model, "tokens": t} for t in settings.tokens[1:]]
    return jobs


def _of_model(settings: Settings, model: dict[str, int]) -> Iterator[Job]:
    """Prompts and steps of one model; what ours is compared with, if only at the shortest length."""
    for contender in (PRUNED, f"{PRUNED}, {GRAPH}", DENSE, f"{DENSE}, {GRAPH}", HALF):
        yield from ({"kind": "prefill", "contender": contender, "model": model, "tokens": t} for t in settings.tokens)
    yield from ({"kind": "decode", "contender": contender, "model": model} for contender in (PRUNED, HF))
    yield {"kind": "prefill", "contender": HF, "model": model, "tokens": settings.tokens[0]}


def run(settings: Settings, out: Path, command: str) -> None:
    """See `simba_compile.cli.bench`."""
    out.mkdir(parents=True, exist_ok=True)

    def write(results: dict[str, Any]) -> str:
        (out / "bench-gpu.json").write_text(json.dumps(results | {"command": command}, indent=1) + "\n")
        page = bench_gpu_report.markdown(results | {"command": command})
        (out / "bench-gpu.md").write_text(page)
        return page

    page = write(measure(settings, write))
    console = Console()
    console.print(page, markup=False, highlight=False)
    console.print(f"Written: {out / 'bench-gpu.json'}, {out / 'bench-gpu.md'}", markup=False, highlight=False)


def measure(settings: Settings, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Measure everything that the budget allows.

    Parameters
    ----------
    settings : Settings
    save : callable
        Is given what there is after each job.

    Returns
    -------
    dict
        "machine"; "settings"; "date"; "jobs": each with its "result", or the reason why it "failed" (with the end of a
        "trace") or was "skipped", and its "seconds".
    """
    jobs = jobs_of(settings)
    results: dict[str, Any] = {
        "machine": {},
        "settings": dataclasses.asdict(settings),
        "date": machine.now(),
        "jobs": jobs,
    }
    with Steps(len(jobs)) as steps:
        for about in supervise([*WORKER, settings.device, str(settings.runs)], jobs, settings.budget, steps.next):
            results["machine"] = about
            save(results)
    return results


def supervise(
    command: Sequence[str], jobs: list[Job], budget: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Have a worker do the jobs, and note in each what came of it; gives, after each, what the worker says of its machine.

    Parameters
    ----------
    command : sequence of str
        Starts a worker.
    jobs : list of dict
        Each gets "result", "failed" (with a "trace", where there is one) or "skipped", and "seconds" where it was begun.
    budget : float
        Seconds for all jobs.
    say : callable
        Is told what is done now.
    """
    end = time.monotonic() + budget
    about: dict[str, Any] = {}
    worker: _Worker | None = None
    try:
        for job in jobs:
            left = end - time.monotonic()
            reason = _why_skipped(job, jobs, left, SHARE * budget)
            say(title(job) if reason is None else f"skipped: {title(job)}")
            if reason is not None:
                job["skipped"] = reason
                yield about
                continue
            begin = time.monotonic()
            if worker is None:
                worker = _Worker(command)
                about = (worker.answer(left) or {}).get("machine", about)
            answer = worker.ask(job, min(end - time.monotonic(), SHARE * budget))
            job["seconds"] = round(time.monotonic() - begin, 2)
            over = answer is None or answer.pop("over", False)
            job.update(worker.why() if answer is None else answer)
            if over:
                worker.end()
                worker = None
            yield about
    finally:
        if worker is not None:
            worker.end()


def _why_skipped(job: Job, jobs: list[Job], left: float, most: float) -> str | None:
    """Why a job is not begun: no time, or the same where it is easier failed, or says that this would not end in time."""
    if left <= 0:
        return "no time was left"
    failed = next((other for other in jobs if "failed" in other and _no_easier(job, other)), None)
    if failed is not None:
        return f"it failed already: {title(failed)}"
    if job["kind"] != "prefill":
        return None
    done = [other for other in jobs if "result" in other and other["kind"] == "prefill"]
    same = [other for other in done if other["contender"] == job["contender"]]
    shorter = [other for other in same if other["model"] == job["model"] and other["tokens"] < job["tokens"]]
    if shorter:
        call = shorter[-1]["result"]["timing"]["median"]
        expected = 3 * call * job["tokens"] / shorter[-1]["tokens"]  # it is called three times at least
        if expected > min(left, most):
            return f"expected to take {expected:.0f} s, after {call:.1f} s a call at {shorter[-1]['tokens']} tokens"
    depth = job["model"]["num_hidden_layers"]
    for other in same:
        layers = other["model"]["num_hidden_layers"]
        if layers < depth and _as_wide(job, other) and other["tokens"] == job["tokens"]:
            first = other["result"]["first"]
            expected = (first or 0.0) * depth / layers  # Hugging Face's own compiles nothing
            if expected > min(left, most):
                return f"expected to take {expected:.0f} s, after {first:.0f} s to compile {layers} layers"
    return None


def _no_easier(job: Job, other: Job) -> bool:
    """Whether a job is the other one on a longer prompt or on more layers, or runs in a way that failed on a small model."""
    if other["kind"] == "agree" and job.get("contender", "").endswith(f", {other['contender']}"):
        return True
    if "model" not in job or job["kind"] != other["kind"] or job["contender"] != other["contender"]:
        return False
    layers = [one["model"]["num_hidden_layers"] for one in (job, other)]
    return _as_wide(job, other) and layers[0] >= layers[1] and job.get("tokens", 0) >= other.get("tokens", 0)


def _as_wide(job: Job, other: Job) -> bool:
    """Whether the models of two jobs differ in their depth alone."""
    return bool(job["model"] | {"num_hidden_layers": other["model"]["num_hidden_layers"]} == other["model"])


def title(job: Job) -> str:
    """A job, to read."""
    parts = [str(value) for name, value in job.items() if name in ("kind", "operator", "dtype", "contender")]
    if "channels" in job:
        parts.append(f"{job['batch']} x {job['channels']} channels")
    if "model" in job:
        parts.append(f"hidden {job['model']['hidden_size']}, {job['model']['num_hidden_layers']} layers")
    return " ".join(parts) + (f", {job['tokens']} tokens" if "tokens" in job else "")


class _Worker:
    """A worker's process: what it is asked, and the JSON objects that it prints, each within a time."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.late = False
        self.told: deque[str] = deque(maxlen=40)  # the last lines of its errors
        self.threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for thread in self.threads:
            thread.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith('{"'):  # what libraries print is not for us
                self.answers.put(line)
        self.answers.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            if line.strip():
                self.told.append(line.rstrip())

    def ask(self, job: Job, seconds: float) -> dict[str, Any] | None:
        """Hand over a job; the answer, or None where there is none in time."""
        try:
            self.process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except OSError:  # it is dead: so says the answer
            pass
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next object that it prints; None where there is none within the time, or none any more."""
        try:
            line = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.late = True
            return None
        return None if line is None else json.loads(line)

    def why(self) -> dict[str, str]:
        """Why there was no answer: "failed", and in "trace" the end of what the process said."""
        if self.late:
            return {"failed": "it took too long"}
        try:
            code = self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            return {"failed": "its process says nothing any more"}
        self.threads[1].join(1.0)
        last = self.told[-1].strip() if self.told else "it said nothing"
        return {"failed": f"its process ended with {code}: {last}", "trace": "\n".join(self.told)}

    def end(self) -> None:
        """Stop the process: by the end of its input, where it still listens."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(0.0 if self.late else 10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # held by a driver that hangs: others go on without it
                self.process.wait(20.0)

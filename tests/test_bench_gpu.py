"""``simba bench --device cuda`` where there is no GPU: the same code on the CPU, but for CUDA's calls in `cli.device`."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from simba_compile import cli
from simba_compile.cli import app, bench_gpu, bench_gpu_report, bench_gpu_worker, bench_kernels
from simba_compile.cli.bench_gpu import DENSE, GRAPH, HF, INDUCTOR, INNER, PRUNED, Settings, supervise
from simba_compile.cli.device import Device
from simba_compile.kernels import gpu

WORKER = """
import json, os, sys, time
print("noise of a library")
print(json.dumps({"machine": {"device": "a test"}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "die":
        print("a trace\\n\\nan illegal address", file=sys.stderr, flush=True)
        os._exit(3)
    if job["do"] == "hang":
        time.sleep(60)
    over = {"over": True} if job["do"] == "fail for good" else {}
    print(json.dumps({"failed": "no"} | over if job["do"].startswith("fail") else {"result": job["n"]}), flush=True)
    if over:
        break
"""


def supervised(*jobs: str, budget: float = 50.0) -> list[dict[str, Any]]:
    """What became of jobs that a worker does as they are named."""
    asked = [{"kind": "x", "do": do, "n": n} for n, do in enumerate(jobs)]
    *_, about = supervise([sys.executable, "-c", WORKER], asked, budget, lambda what: None)
    assert about == ({"device": "a test"} if budget > 0 else {})
    return asked


def test_one_job_does_not_lose_the_rest() -> None:
    """A failure, a dead process: the jobs after it run, in the same process or in another."""
    first, failed, second, dead, third, lost, fourth = supervised("run", "fail", "run", "die", "run", "fail for good", "run")
    assert [job["result"] for job in (first, second, third, fourth)] == [0, 2, 4, 6]
    assert failed["failed"] == lost["failed"] == "no"
    assert dead["failed"] == "its process ended with 3: an illegal address"
    assert dead["trace"] == "a trace\nan illegal address"


def test_a_worker_ends_where_its_device_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After a bad address CUDA raises the same error at every further call, in this process."""
    lost: list[bool] = []

    def rms_norm(*args: object, **more: object) -> None:
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait(device: Device) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_kernels, "error", rms_norm)
    monkeypatch.setattr(Device, "wait", wait)
    jobs = [{"kind": "copy"}, *({"kind": "correct", "operator": "rms_norm", "dtype": "float32"} for _ in range(2))]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(job) + "\n" for job in jobs)))
    bench_gpu_worker.main("cpu", 1)
    machine, failed, over = map(json.loads, capsys.readouterr().out.splitlines())  # and nothing of the last one
    assert "machine" in machine and "over" not in failed and "TypeError" in failed["failed"]  # a job without its numbers
    assert "in rms_norm" in over.pop("trace")
    assert over == {"failed": "RuntimeError: CUDA error: an illegal memory access was encountered", "over": True}


def test_what_was_measured_is_written_after_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the benchmark is stopped, all but the job at hand is there."""

    def stopped(command: object, jobs: list[dict[str, Any]], *rest: object) -> Iterator[dict[str, Any]]:
        jobs[0]["result"] = {"rate": 5e9}
        yield {"device": "a test"}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "supervise", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.run(Settings.quick("cpu", inductor=False), tmp_path, "simba bench")
    results = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert results["jobs"][0]["result"] == {"rate": 5e9}
    assert "a test; a copy moves 5 GB/s" in (tmp_path / "bench-gpu.md").read_text()


def test_a_job_that_takes_too_long_is_ended() -> None:
    """At a share of the budget; the next one runs."""
    hung, after = supervised("hang", "run", budget=10.0)
    assert hung["failed"] == "it took too long" and after["result"] == 1


def test_without_time_left_all_is_skipped() -> None:
    assert [job["skipped"] for job in supervised("run", "run", budget=0.0)] == ["no time was left"] * 2


def test_a_longer_prompt_that_cannot_end_in_time_is_skipped() -> None:
    some = {"kind": "prefill", "contender": HF, "model": {"hidden_size": 8, "num_hidden_layers": 1}}
    done = some | {"tokens": 100, "result": {"timing": {"median": 2.0}}}
    jobs = [done, some | {"tokens": 200}, some | {"tokens": 1000}, some | {"contender": DENSE, "tokens": 1000}]
    reasons = [bench_gpu._why_skipped(job, jobs, 100.0, 20.0) for job in jobs[1:]]
    assert reasons == [None, "expected to take 60 s, after 2.0 s a call at 100 tokens", None]


def test_a_deeper_model_that_cannot_be_compiled_in_time_is_skipped() -> None:
    some = {"kind": "prefill", "contender": INDUCTOR, "tokens": 100}
    shallow, deep = ({"hidden_size": 8, "num_hidden_layers": layers} for layers in (2, 24))
    done = some | {"model": shallow, "result": {"first": 5.0, "timing": {"median": 1.0}}}
    wider, of_others = some | {"model": deep | {"hidden_size": 9}}, some | {"model": deep, "contender": HF}
    jobs = [done, some | {"model": deep}, wider, of_others]
    reasons = [bench_gpu._why_skipped(job, jobs, 100.0, 50.0) for job in jobs[1:]]
    assert reasons == ["expected to take 60 s, after 5 s to compile 2 layers", None, None]


def test_what_failed_is_not_tried_where_it_is_harder() -> None:
    """On longer prompts and more layers; and where a way to run a model failed on a small one, nowhere."""
    model = {"hidden_size": 8, "num_hidden_layers": 2}
    some = {"kind": "prefill", "contender": HF, "model": model, "tokens": 200}
    failed = some | {"failed": "no"}
    others = [
        some | {"tokens": 400},
        some | {"model": model | {"num_hidden_layers": 4}},
        some | {"tokens": 100},
        some | {"model": model | {"hidden_size": 9}},
        some | {"contender": DENSE},
        {"kind": "decode", "contender": HF, "model": model},
    ]
    kernels = [{"kind": kind, "operator": "select", "failed": "no"} for kind in ("copy", "correct", "far", "kernel")]
    skipped = [bench_gpu._why_skipped(job, [*kernels, failed, *others], 100.0, 50.0) for job in others]
    assert skipped == ["it failed already: prefill HF hidden 8, 2 layers, 200 tokens"] * 2 + [None] * 4
    graph = {"kind": "agree", "contender": GRAPH, "failed": "no"}
    jobs = [some | {"contender": f"{PRUNED}, {GRAPH}"}, some | {"contender": PRUNED}]
    skipped = [bench_gpu._why_skipped(job, [graph, *jobs], 100.0, 50.0) for job in jobs]
    assert skipped == ["it failed already: agree CUDA graph", None]


def test_a_dry_run_on_the_cpu(tmp_path: Path) -> None:
    """Every job runs, in a worker of its own, and the report has what it measured."""
    bench_gpu.run(Settings.quick("cpu", inductor=False), tmp_path, "simba bench")
    results = json.loads((tmp_path / "bench-gpu.json").read_text())
    failed = [job for job in results["jobs"] if "result" not in job]
    assert not failed, failed
    jobs = results["jobs"]
    timed = {job["operator"] for job in jobs if job["kind"] == "kernel"}
    assert timed == {name for name in bench_kernels.CASES if not name.endswith("_backward")}
    for job in jobs:
        if job["kind"] in bench_gpu_report.CHECKS:
            assert job["result"]["right"], job
        if "timing" in job["result"]:
            assert job["result"]["timing"]["min"] > 0
    contenders = {job["contender"] for job in jobs if job["kind"] == "prefill"}
    assert contenders == {HF, DENSE, "simba keep 0.5", PRUNED, f"{PRUNED}, {GRAPH}", f"{DENSE}, {GRAPH}"}
    shares = [job["result"]["shares"] for job in jobs if job["kind"] == "profile"]
    assert all(0 < share["influence"] < 1 and share["gather"] > 0 for share in shares)
    page = (tmp_path / "bench-gpu.md").read_text()
    for shown in (results["machine"]["device"], "mamba-ssm selective_scan_fn", "One decoding step", "ModuleNotFoundError"):
        assert shown in page


def test_the_full_benchmark_covers_what_it_should() -> None:
    """Every kernel, three sizes at three lengths, the shallow model for Inductor."""
    settings = Settings.full("cuda", 7, inductor=True)
    jobs = bench_gpu.jobs_of(settings)
    assert {make(**bench_kernels.SMALL).operator for make in bench_kernels.CASES.values()} == gpu.KERNELS.keys()
    batch, tokens = settings.far
    assert (batch - 1) * tokens * settings.kernels["channels"] >= 2**31 > tokens * 2 * settings.kernels["channels"]
    prefills = [job for job in jobs if job["kind"] == "prefill"]
    prompts = {(job["model"]["hidden_size"], job["tokens"]) for job in prefills}
    assert prompts == {(hidden, tokens) for hidden in (768, 2048, 2560) for tokens in (2048, 8192, 32768)}
    for contender in (INDUCTOR, f"{PRUNED}, {INNER}"):
        asked = [job["model"] for job in prefills if job["contender"] == contender]
        sizes = [(model["hidden_size"], model["num_hidden_layers"]) for model in asked]
        assert sizes == [(768, 2), (2560, 2), (768, 24)]
    written = [json.dumps(job, sort_keys=True) for job in jobs]
    assert len(written) == len({*written})
    of_largest = [job for job in prefills if job["model"]["hidden_size"] == 2560]
    assert [job["contender"] for job in of_largest].index(HF) < len(of_largest) - 2  # if only at the shortest length


@pytest.mark.parametrize("dtype", bench_kernels.TYPES)
def test_a_result_that_is_no_number_is_wrong(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is as wrong as can be, also beside results that are right."""
    monkeypatch.setattr(bench_kernels.Case, "run", lambda case: case.args[0] * float("nan"))
    assert bench_kernels.error("rms_norm", Device("cpu"), dtype, bench_kernels.SMALL) == float("inf")


def test_a_result_that_varies_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a race, however little and seldom."""
    off = iter([0.0, 0.0, 1e-6, 0.0])

    def run(case: bench_kernels.Case) -> Any:
        return torch.ops.simba.rms_norm(*case.args) * (1 + next(off))

    monkeypatch.setattr(bench_kernels.Case, "run", run)
    assert bench_kernels.error("rms_norm", Device("cpu"), "float32", bench_kernels.SMALL) < 1e-5
    assert bench_kernels.error("rms_norm", Device("cpu"), "float32", bench_kernels.SMALL, runs=3) == float("inf")


def test_arguments_are_laid_out_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pieces of projections, also where there are several runs."""
    seen = []

    def run(case: bench_kernels.Case) -> Any:
        seen.append(case.args[0].stride())
        return torch.ops.simba.causal_conv1d(*case.args)

    monkeypatch.setattr(bench_kernels.Case, "run", run)
    bench_kernels.error("causal_conv1d", Device("cpu"), "bfloat16", bench_kernels.SMALL, runs=2)
    assert seen == [(2 * 96 * 100, 2 * 96, 1)] * 2


def test_nothing_is_timed_after_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the profiler goes on to slow down what is launched: the worker ends."""

    def stop(**_: object) -> None:
        raise InterruptedError

    measured = Device("cpu")
    measured.is_gpu = True
    monkeypatch.setattr(Device, "wait", lambda device: None)
    monkeypatch.setattr(cli.device, "profile", stop)
    with pytest.raises(InterruptedError):
        measured.profiled(lambda: None)
    assert not measured.is_usable()
    jobs = bench_gpu.jobs_of(Settings.full("cuda", 7, inductor=True))
    for profile, after in itertools.pairwise(jobs):
        assert profile["kind"] != "profile" or after.get("model") != profile["model"]


def test_peers_are_those_that_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is there but fails is as good as missing: transformers runs its loop."""
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert [cli.device._imports(name) for name in ("json", "broken_peer", "no_such_peer")] == [True, False, False]


def test_the_report_shows_what_is_wrong() -> None:
    """In its first line, and in the table."""
    jobs = [
        {"kind": "correct", "operator": name, "dtype": "float32", "result": {"error": 0.5, "right": right}}
        for name, right in (("select", False), ("gather", True))
    ]
    page = bench_gpu_report.markdown({"machine": {}, "jobs": jobs, "command": "simba bench", "date": "today"})
    assert "Checks: 1 of 2 are right; WRONG: correct, select, float32." in page and page.count("WRONG") == 2


def test_what_the_cache_holds_is_not_compared_with_a_copy() -> None:
    """It may well be faster than one in memory."""
    timing = {"median": 5e-6, "min": 4e-6, "max": 6e-6}
    moved = {"kind": "kernel", "operator": "gather", "batch": 1, "tokens": 8}
    jobs = [
        {"kind": "copy", "result": {"rate": 4e12}},
        *(moved | {"result": {"timing": timing, "bytes": size, "rate": size / 5e-6}} for size in (3e6, 5e6)),
    ]
    about = {"cache_bytes": 1e6}
    page = bench_gpu_report.markdown({"machine": about, "jobs": jobs, "command": "simba bench", "date": "today"})
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| gather")]
    assert [row[4] for row in rows] == ["5.0 µs"] * 2 and [row[6] for row in rows] == ["", "25%"]


def test_each_prompt_is_beside_ours_as_kernels_and_as_a_graph() -> None:
    """A base that was not measured leaves its column empty."""
    model = {"hidden_size": 8, "num_hidden_layers": 2}
    jobs = [
        {"kind": "prefill", "contender": contender, "model": model, "tokens": tokens,
         "result": {"timing": {"median": median, "min": median, "max": median}, "first": first, "memory_mib": None}}
        for contender, tokens, median, first in (
            (PRUNED, 10, 2.0, 7.0), (f"{PRUNED}, {GRAPH}", 10, 1.0, None), (HF, 10, 4.0, 4.0), (PRUNED, 20, 3.0, None),
        )
    ]  # fmt: skip
    page = bench_gpu_report.markdown({"machine": {}, "jobs": jobs, "command": "simba bench", "date": "today"})
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| hidden")]
    assert [row[6] for row in rows] == ["7.00 s", "", "4.00 s", ""]
    assert [row[8:10] for row in rows] == [["1.00", "2.00"], ["0.50", "1.00"], ["2.00", "4.00"], ["1.00", ""]]


def test_the_report_names_what_is_missing() -> None:
    job = {"kind": "copy", "megabytes": 1, "failed": "out of memory"}
    page = bench_gpu_report.markdown({"machine": {}, "jobs": [job], "command": "simba bench", "date": "today"})
    assert "copy: failed: out of memory" in page and "a copy was not measured" in page


def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert result.exit_code == 2 and "torch sees no GPU" in result.output

"""``simba bench --device cuda`` where there is no GPU: the same code on the CPU, but for CUDA's calls in `cli.device`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from simba_compile.cli import app, bench_gpu, bench_gpu_report, bench_kernels
from simba_compile.cli.bench_gpu import DENSE, GRAPH, HF, INDUCTOR, PRUNED, Settings, supervise
from simba_compile.kernels import gpu

WORKER = """
import json, os, sys, time
print("noise of a library")
print(json.dumps({"machine": {"device": "a test"}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "die":
        print("an illegal address", file=sys.stderr, flush=True)
        os._exit(3)
    if job["do"] == "hang":
        time.sleep(60)
    print(json.dumps({"failed": "no"} if job["do"] == "fail" else {"result": job["n"]}), flush=True)
"""


def supervised(*jobs: str, budget: float = 50.0) -> list[dict[str, Any]]:
    """What became of jobs that a worker does as they are named."""
    asked = [{"kind": "x", "do": do, "n": n} for n, do in enumerate(jobs)]
    about = supervise([sys.executable, "-c", WORKER], asked, budget, lambda what: None)
    assert about == ({"device": "a test"} if budget > 0 else {})
    return asked


def test_one_job_does_not_lose_the_rest() -> None:
    """A failure, a dead process: the jobs after it run, in the same process or in another."""
    first, failed, second, dead, third = supervised("run", "fail", "run", "die", "run")
    assert (first["result"], second["result"], third["result"]) == (0, 2, 4)
    assert failed["failed"] == "no" and dead["failed"] == "its process ended with 3: an illegal address"


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
    reasons = [bench_gpu._too_long(job, jobs, 100.0, 20.0) for job in jobs[1:]]
    assert reasons == [None, "expected to take 60 s, after 2.0 s a call at 100 tokens", None]


def test_a_dry_run_on_the_cpu(tmp_path: Path) -> None:
    """Every job runs, in a worker of its own, and the report has what it measured."""
    bench_gpu.run(Settings.quick("cpu", inductor=False), tmp_path, "simba bench")
    results = json.loads((tmp_path / "bench-gpu.json").read_text())
    failed = [job for job in results["jobs"] if "result" not in job]
    assert not failed, failed
    jobs = results["jobs"]
    assert {job["operator"] for job in jobs if job["kind"] == "kernel"} == bench_kernels.CASES.keys()
    for job in jobs:
        if job["kind"] == "correct":
            assert job["result"]["error"] <= 2e-2, job  # bfloat16's
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
    """Every kernel that a prompt or a decoding step runs, three sizes at three lengths, the shallow model for Inductor."""
    jobs = bench_gpu.jobs_of(Settings.full("cuda", 7, inductor=True))
    of_training_or_steps = {name for name in gpu.KERNELS if name.endswith("_backward")} | {"conv_update"}
    assert bench_kernels.CASES.keys() == gpu.KERNELS.keys() - of_training_or_steps
    prompts = {(job["model"]["hidden_size"], job["tokens"]) for job in jobs if job["kind"] == "prefill"}
    assert prompts == {(hidden, tokens) for hidden in (768, 2048, 2560) for tokens in (2048, 8192, 32768)}
    inductor = [job["model"]["num_hidden_layers"] for job in jobs if job.get("contender") == INDUCTOR]
    assert inductor == [bench_gpu.INDUCTOR_LAYERS]


def test_the_report_names_what_is_missing() -> None:
    job = {"kind": "copy", "megabytes": 1, "failed": "out of memory"}
    page = bench_gpu_report.markdown({"machine": {}, "jobs": [job], "command": "simba bench", "date": "today"})
    assert "copy: failed: out of memory" in page and "a copy was not measured" in page


def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert result.exit_code == 2 and "torch sees no GPU" in result.output

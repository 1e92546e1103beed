"""What ``simba bench --device cuda`` measured, as a Markdown page."""

from collections.abc import Callable
from typing import Any

from simba_compile.cli.bench import SCORING
from simba_compile.cli.show import clock, markdown_table, spread

FASTER = "simba keep 0.1"  # whose speedups over the others are shown, started kernel by kernel and as a graph
GRAPHED = f"{FASTER}, CUDA graph"
IN_CACHE = 4  # what moves fewer bytes than this many second-level caches is not held against a copy in memory
CHECKS = {
    "correct": "against its definition in float64",
    "far": "where offsets take more than 32 bits, against small ones",
    "agree": "a small model in float32, against the CPU",
}


def markdown(results: dict[str, Any]) -> str:
    """The report: facts, one table for each kind of job, and what failed or was left out."""
    about, jobs = results["machine"], results["jobs"]
    bandwidth = next((job["result"]["rate"] for job in jobs if job["kind"] == "copy" and "result" in job), None)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "cuda") if name in about)
    copies = "a copy was not measured" if bandwidth is None else f"a copy moves {bandwidth / 1e9:.0f} GB/s, read and written"
    checks = [job for job in jobs if job["kind"] in CHECKS and "result" in job]
    right = sum(job["result"]["right"] for job in checks)
    wrong = "; ".join(_name(job) for job in checks if not job["result"]["right"])
    facts = [
        f"Checks: {right} of {len(checks)} are right" + (f"; WRONG: {wrong}." if wrong else "."),
        f"Device: {about.get('device', 'unknown')}; {copies}. {versions}.",
        "Models have random weights, batch 1, bfloat16; a prompt is timed up to the next token's logits, without a cache; "
        "Hugging Face's without a CUDA graph. Inductor takes minutes for models of full depth: those of 2 layers stand in. "
        "Whoever is first with a model also compiles Triton's kernels.",
        f"Of mamba_ssm and causal_conv1d, {' and '.join(about.get('peers', ())) or 'neither'} can be imported here. Without "
        "mamba_ssm, Hugging Face's eager model runs a loop over the tokens in PyTorch.",
        f"Kernels that move fewer bytes than {IN_CACHE} second-level caches are not held against a copy in memory.",
        f"Command: `{results['command']}` ({results['date']}).",
    ]
    parts = ["# simba bench on a GPU", "\n".join(f"- {fact}" for fact in facts)]
    tables: dict[str, Callable[[list[dict[str, Any]]], list[list[str]]]] = {
        "kernel": lambda done: _kernels(done, bandwidth, about.get("cache_bytes", 0)),
        "prefill": _prefill,
        "decode": _decode,
        "profile": _profile,
    }
    for kind, rows_of in tables.items():
        done = [job for job in jobs if job["kind"] == kind and "result" in job]
        if done:
            heading, columns = HEADINGS[kind]
            parts += [f"## {heading}", markdown_table(columns, rows_of(done))]
    if checks:
        rows = [
            [CHECKS[job["kind"]], job.get("operator", job.get("contender", "")), job.get("dtype", ""), _shape(job),
             f"{job['result']['error']:.1e}", "right" if job["result"]["right"] else "WRONG"]
            for job in checks
        ]  # fmt: skip
        heading = "## Checks: how far off, as a share of the largest number"
        parts += [heading, markdown_table(["", "", "", "shape", "off", ""], rows)]
    missing = [(job, word, job[word]) for job in jobs for word in ("failed", "skipped") if word in job]
    if missing:
        parts += ["## Not measured", "\n".join(f"- {_name(job)}: {word}: {reason}" for job, word, reason in missing)]
    return "\n\n".join(parts) + "\n"


HEADINGS = {
    "kernel": (
        "Kernels (bfloat16), as CUDA graphs",
        ["", "batch", "tokens", "median", "GB/s", "of a copy's", "peer", "peer's median", "influence / scan"],
    ),
    "prefill": (
        "Prompts",
        ["", "", "tokens", "median", "spread", "first call, compiling", "memory", f"/ {FASTER}", f"/ {GRAPHED}"],
    ),
    "decode": ("One decoding step as a CUDA graph", ["", "", "median", "spread"]),
    "profile": (
        "Within one pruned prompt",
        ["", "tokens", *SCORING, "together", "waits of the host for the device"],
    ),
}


def _name(job: dict[str, Any]) -> str:
    named = [str(job[name]) for name in ("kind", "operator", "contender", "dtype", "tokens") if name in job]
    return ", ".join(named + ([_model(job)] if "model" in job else []))


def _shape(job: dict[str, Any]) -> str:
    return " × ".join(str(job[name]) for name in ("batch", "tokens", "channels") if name in job)


def _model(job: dict[str, Any]) -> str:
    return f"hidden {job['model']['hidden_size']}, {job['model']['num_hidden_layers']} layers"


def _kernels(done: list[dict[str, Any]], bandwidth: float | None, cache: int) -> list[list[str]]:
    scans = {
        (job["batch"], job["tokens"]): job["result"]["timing"]["median"]
        for job in done
        if job["operator"] == "selective_scan"
    }
    rows = []
    for job in done:
        result, median = job["result"], job["result"]["timing"]["median"]
        scan = scans.get((job["batch"], job["tokens"])) if job["operator"] == "influence" else None
        peer = clock(result["peer_timing"]["median"]) if "peer_timing" in result else result.get("peer_failed", "")
        rows.append([
            job["operator"], str(job["batch"]), str(job["tokens"]), clock(median), f"{result['rate'] / 1e9:.0f}",
            "" if bandwidth is None or result["bytes"] < IN_CACHE * cache else f"{result['rate'] / bandwidth:.0%}",
            result.get("peer", ""), peer,
            "" if scan is None else f"{median / scan:.2f}",
        ])  # fmt: skip
    return rows


def _prefill(done: list[dict[str, Any]]) -> list[list[str]]:
    medians = {(job["contender"], _model(job), job["tokens"]): job["result"]["timing"]["median"] for job in done}
    rows = []
    for job in done:
        result = job["result"]
        median, first, memory = result["timing"]["median"], result["first"], result["memory_mib"]
        bases = [medians.get((ours, _model(job), job["tokens"])) for ours in (FASTER, GRAPHED)]
        rows.append([
            _model(job), job["contender"], str(job["tokens"]), clock(median), spread(result["timing"]),
            "" if first is None else clock(first), "" if memory is None else f"{memory:.0f} MiB",
            *("" if base is None else f"{median / base:.2f}" for base in bases),
        ])  # fmt: skip
    return rows


def _decode(done: list[dict[str, Any]]) -> list[list[str]]:
    timings = [(job, job["result"]["timing"]) for job in done]
    return [[_model(job), job["contender"], clock(timing["median"]), spread(timing)] for job, timing in timings]


def _profile(done: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for job in done:
        result = job["result"]
        waits = ", ".join(f"{name} {count}" for name, count in result["waits"].items()) or "none"
        shares = [f"{result['shares'][name]:.1%}" for name in SCORING]
        rows.append([_model(job), str(job["tokens"]), *shares, f"{result['share']:.1%}", waits])
    return rows

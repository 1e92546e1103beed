"""Name the machine that measured something, and how it was asked to."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

# What memory and threads depend on. Hugging Face's eager mode is much faster where glibc keeps the memory that is freed.
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_")


def command(*program: str) -> str:
    """How this process, a run of the program, was called, variables that measurements depend on included."""
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    return shlex.join([*given, *program, *sys.argv[1:]])


def now() -> str:
    """The time of a measurement."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cpu_name() -> str:
    """The processor's name, as its maker gives it where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instructions() -> str:
    """The widest vectors that torch uses, and which instructions for bfloat16 there are beside them."""
    import torch

    has = torch.cpu.get_capabilities()
    beside = {"AVX512_BF16": has.get("avx512_bf16"), "AMX": has.get("amx_bf16")}
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, there in beside.items() if there)])


def describe() -> dict[str, str | int]:
    """What a measurement depends on: processor, cores, threads, versions."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def one_line() -> str:
    """`describe`, to print."""
    facts = describe()
    return (
        f"{facts['cpu']} ({facts['instructions']}), {facts['cores']} cores, {facts['threads']} threads, "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}"
    )

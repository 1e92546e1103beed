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


def describe() -> dict[str, str | int]:
    """What a measurement depends on: processor, cores, threads, versions."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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

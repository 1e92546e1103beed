"""How much memory one contender of ``simba bench`` takes for a prompt: run by it in a fresh process.

The growth of the peak of resident memory over one call, after a short prompt has compiled the graph and touched all
weights.
"""

import contextlib
import json
import resource
import sys
from pathlib import Path

import torch

from simba_compile.cli import models
from simba_compile.cli.bench import compile_model

WARM_TOKENS = 64


def _status(field: str) -> float:
    """A size in MiB from what Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def resident() -> float:
    """The memory this process holds now, in MiB; where the system does not tell, the most that it has held."""
    return _status("VmRSS") if sys.platform == "linux" else peak()


def forget_peak() -> None:
    """Have the peak start anew from what is held now, where the system lets us."""
    with contextlib.suppress(OSError):  # where it does not, only what goes beyond the peak before is counted
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most memory that this process has held since `forget_peak`, in MiB."""
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(request: dict) -> dict[str, float]:
    """Measure what `bench` asks for."""
    torch.set_num_threads(request["threads"])
    models.quiet()
    model = models.random_mamba(request["layers"], request["sizes"])
    forward = compile_model(request["name"], model)
    ids = models.random_ids(request["sizes"]["vocab_size"], request["tokens"])
    with torch.no_grad():
        forward(ids[:, :WARM_TOKENS], use_cache=False, logits_to_keep=1)
        forget_peak()
        before = resident()
        forward(ids, use_cache=False, logits_to_keep=1)
    return {"growth_mib": round(peak() - before, 1)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

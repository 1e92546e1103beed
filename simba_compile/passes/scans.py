"""The scans that a graph may hold, as data: what a pass must know of each of them."""

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from simba_compile.passes.tokens import value_of

OPS = torch.ops.simba
CONV = OPS.causal_conv1d


@dataclasses.dataclass(frozen=True)
class Scan:
    """A kind of scan.

    Attributes
    ----------
    kind : str
        What `explain` calls it.
    operator : operator
        What runs it.
    arguments : tuple of str
        The names of the operator's arguments, in order.
    along_tokens : tuple of str
        Those that have tokens, which a gather fused into the scan takes.
    influence : operator
        What scores its tokens.
    scored : tuple of str
        The arguments that the score reads, in its order.
    """

    kind: str
    operator: Any
    arguments: tuple[str, ...]
    along_tokens: tuple[str, ...]
    influence: Any
    scored: tuple[str, ...]

    def named(self, scan: Node) -> dict[str, Any]:
        """The arguments of a scan by name."""
        return dict(zip(self.arguments, scan.args, strict=True))


SCANS = {
    OPS.selective_scan: Scan(
        kind="mamba1",
        operator=OPS.selective_scan,
        arguments=("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "index"),
        along_tokens=("x", "dt", "B", "C", "z"),
        influence=OPS.influence,
        scored=("x", "dt", "A", "B", "C", "dt_bias", "softplus"),
    ),
    OPS.ssd_scan: Scan(
        kind="mamba2",
        operator=OPS.ssd_scan,
        arguments=("x", "dt", "A", "B", "C", "D", "dt_bias", "softplus", "dt_min", "dt_max", "initial", "index"),
        along_tokens=("x", "dt", "B", "C"),
        influence=OPS.ssd_influence,
        scored=("x", "dt", "A", "B", "C", "dt_bias", "softplus", "dt_min", "dt_max"),
    ),
}


def arithmetic(scan: Node) -> tuple[int, int]:
    """Floating-point operations for one token that is scanned, and for one that is scored.

    Mamba-1: for each state seven in the scan (Δ·A, exp, decay, two for B, two for C), four in the score (A·S, exp, two for
    the sum). Mamba-2: five for each state (decay, two for B, two for C); the score takes a product C·B for each group, two
    for each of its numbers, and three for each channel.
    """
    named = SCANS[scan.target].named(scan)  # type: ignore[index]
    if scan.target is OPS.selective_scan:
        states = value_of(named["A"]).numel()
        return 7 * states, 4 * states
    channels = value_of(named["x"]).shape[2:].numel()
    groups = value_of(named["B"]).shape[2:]
    return 5 * channels * groups[1], 2 * groups.numel() + 3 * channels

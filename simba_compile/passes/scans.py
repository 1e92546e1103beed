"""The scans that a graph may hold, as data: what a pass must know of each of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import simba_compile.kernels  # noqa: F401  (registers torch.ops.simba)

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

    def named(self, given: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.arguments, given, strict=True))

    def scored_of(self, given: Sequence[Any]) -> list[Any]:
        """What the score reads of a call's arguments."""
        named = self.named(given)
        return [named[name] for name in self.scored]


MAMBA1 = Scan(
    kind="mamba1",
    operator=OPS.selective_scan,
    arguments=("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "index"),
    along_tokens=("x", "dt", "B", "C"),
    influence=OPS.influence,
    scored=("x", "dt", "A", "B", "C", "dt_bias", "softplus"),
)
MAMBA2 = Scan(
    kind="mamba2",
    operator=OPS.ssd_scan,
    arguments=("x", "dt", "A", "B", "C", "D", "dt_bias", "softplus", "dt_min", "dt_max", "initial", "index"),
    along_tokens=("x", "dt", "B", "C"),
    influence=OPS.ssd_influence,
    scored=("x", "dt", "A", "B", "C", "dt_bias", "softplus", "dt_min", "dt_max"),
)
SCANS = {scan.operator: scan for scan in (MAMBA1, MAMBA2)}
# What these compute on kept tokens is what the method says (docs/method.md); no value at full length stands behind it.
MIXER_OPERATORS = {CONV, *SCANS}

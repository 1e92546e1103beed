"""The modes that values are computed under: with gradients or without, under autocast, in inference mode.

Dynamo writes the switches into the graph, as calls. What is computed a second time (for all tokens) is computed under the
modes of the first time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

EXITS: dict[Any, Callable] = {
    torch.amp.autocast_mode._enter_autocast: torch.amp.autocast_mode._exit_autocast,
    torch.autograd.grad_mode._enter_inference_mode: torch.autograd.grad_mode._exit_inference_mode,
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """Whether gradients are recorded, and the regions (what enters them, with its arguments), outermost first."""

    grad: bool
    regions: tuple[tuple[Any, tuple], ...] = ()


class Modes:
    """The mode at each node of a graph that is walked in order."""

    def __init__(self) -> None:
        self.present = Mode(torch.is_grad_enabled())
        self.of: dict[Node, Mode] = {}

    def note(self, node: Node) -> bool:
        """Follow a node, which may switch a mode; whether it did."""
        before, regions, name = self.present, self.present.regions, getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            self.present = Mode(node.args[0], regions)  # type: ignore[arg-type]
        elif name.startswith("_enter_"):
            self.present = Mode(before.grad, (*regions, (node.target, node.args)))
        elif name.startswith("_exit_"):
            self.present = Mode(before.grad, regions[:-1])
        self.of[node] = self.present
        return self.present != before

    def leads_to(self, mode: Mode) -> bool:
        """Whether a mode is the present one, or can be switched to from here."""
        depth = len(self.present.regions)
        return mode.regions[:depth] == self.present.regions and all(enter in EXITS for enter, _ in mode.regions[depth:])

    @contextlib.contextmanager
    def switched_to(self, mode: Mode, out: Graph) -> Iterator[None]:
        """What is written meanwhile is computed under this mode, which the present one `leads_to`."""
        before = self.present
        inside = mode.regions[len(before.regions) :]
        entered = [out.call_function(enter, args) for enter, args in inside]
        if mode.grad != before.grad:
            out.call_function(torch._C._set_grad_enabled, (mode.grad,))
        self.present = mode
        yield
        if mode.grad != before.grad:
            out.call_function(torch._C._set_grad_enabled, (before.grad,))
        for (enter, _), node in zip(reversed(inside), reversed(entered), strict=True):
            out.call_function(EXITS[enter], (node,))
        self.present = before


def mode_changes(first: Node, last: Node) -> bool:
    """Whether autocast, or whether gradients are recorded, changes between two nodes."""
    while first is not last:
        first = first.next
        if getattr(first.target, "__name__", "").startswith(("_enter_", "_exit_", "_set_grad_enabled")):
            return True
    return False

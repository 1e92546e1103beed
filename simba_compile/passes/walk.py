"""Walks over a graph."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from torch.fx import Node

T = TypeVar("T", bound=Hashable)


def reached(start: Iterable[T], step: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """What a walk comes to: where it begins, and all that steps from there lead to, each once and the nearest first."""
    found = list(dict.fromkeys(start))
    seen = set(found)
    for one in found:  # grows while it is walked
        yield one
        new = [other for other in dict.fromkeys(step(one)) if other not in seen]
        seen.update(new)
        found += new


def made_of(*values: Node) -> Iterator[Node]:
    """The values and all that they are made of, the nearest first."""
    return reached(values, lambda node: node.all_input_nodes)

"""Full-length values out of pruned ones (docs/method.md).

A token that leaves keeps its residual stream as it was on leaving. The stream is the chain of residual adds: each node
of it has one operand that is the stream before. Restoring a node of the stream lays the chain's values over each other,
the oldest, at full length, at the bottom; restoring anything that treats tokens apart computes it from restored inputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from simba_compile.passes.edit import sizes
from simba_compile.passes.effects import is_inplace, storage_of, written
from simba_compile.passes.match import ADDS, Mixer
from simba_compile.passes.tokens import CASTS, NORMS, POINTWISE
from simba_compile.passes.walk import reached

_CHANGES: set[Any] = POINTWISE | NORMS
_MEANS: set[Any] = {"mean", "var", "std", torch.mean, torch.var, torch.std}  # of channels, in norms that are in parts


class Stream:
    """The residual stream of a graph: which adds belong to it, and which operand of each is the stream before.

    Parameters
    ----------
    graph : Graph
    mixers : iterable of Mixer
        Their residual adds are where the stream is known; other adds onto its values since the last of those (of an MLP,
        say) join by themselves, and so do those onto what scales or norms made of the stream, if a mixer is still to come:
        behind the last one that is a head. Adds onto an earlier one (the embedding once more) do not: the stream has left it
        behind. Nor do those that only change it: ``h + 0.1 * h`` scales.
    """

    def __init__(self, graph: Graph, mixers: tuple[Mixer, ...]) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        writes = (node for node in graph.nodes if is_inplace(node))
        self.changing = {storage_of(value) for node in writes for value in written(node)}
        self.before: dict[Node, Node] = {}
        self.values: set[Node] = set()  # these, and what the first of them were added onto
        # Its values since the last mixer, and above them those of a stream within a block, if one goes on there.
        self.chains: list[list[Node]] = []
        self.last = max((self.place[mixer.add] for mixer in mixers if mixer.add), default=0)
        self.residuals = {mixer.add: mixer.residual for mixer in mixers if mixer.add and mixer.residual}

    def note(self, node: Node) -> None:
        """Take an add onto the stream into it."""
        if node in self.residuals:
            before = self.residuals[node]
        elif node.target in ADDS:
            sources = {self.uncast(source): source for source in node.all_input_nodes}
            found = self._stream_among(list(sources), node)
            if found is None:
                return
            before = sources[found]
        else:
            return
        base = self.uncast(before)
        if not any(base in chain for chain in self.chains):
            self.chains.append([base])  # what something made of the stream: the stream from here on, or within a block
        place = next(i for i, chain in enumerate(self.chains) if base in chain)
        values = [] if node in self.residuals else self.chains[place]
        self.chains[place:] = [[*values, node]]  # with values of two, the inner stream ends here
        self.before[node] = before
        self.values |= {node, before, base}

    def _stream_among(self, sources: list[Node], add: Node) -> Node | None:
        """Which of those that are added is the stream before, where one is and another is what a layer adds to it."""
        for chain in self.chains:
            base = next((value for value in reversed(chain) if value in sources), None)
            if base is not None:
                only_changed = all(self._is_change(other, base) for other in sources if other is not base)
                return None if only_changed else base
        if not self.chains or self.place[add] > self.last:
            return None
        stream = self.chains[-1][-1]
        changes = [value for value in sources if self._is_change(value, stream) and sizes(value) == sizes(stream)]
        if len(changes) != 1:
            return None
        is_of_a_layer = any(stream in self._way(value, stream) for value in sources if value not in changes)
        return changes[0] if is_of_a_layer else None

    def _is_change(self, value: Node, base: Node) -> bool:
        """Whether a value is another one scaled, normed or the like: made of it through no layer."""
        found = False
        for node in self._way(value, base):
            if node is not base and not _changes(node):
                return False
            found |= node is base
        return found

    def _way(self, value: Node, base: Node) -> Iterator[Node]:
        """What a value is made of, the nearest first, and no further back than to another one."""

        def sources(node: Node) -> list[Node]:
            return [source for source in node.all_input_nodes if self.place[source] >= self.place[base]]

        return reached([value], sources)

    def uncast(self, node: Node) -> Node:
        """What the node is a cast or a copy of, if it is one, and both stay as they are."""
        while node.target in CASTS and isinstance(node.args[0], Node):
            if self.changing & {storage_of(node), storage_of(node.args[0])}:
                break
            node = node.args[0]
        return node


def _changes(node: Node) -> bool:
    """Whether an operation treats the numbers of a token alike, or norms them."""
    if node.target in _MEANS:
        return len(node.args) > 1 and node.args[1] in (-1, [-1], (-1,), len(sizes(node.args[0])) - 1)
    return node.target in _CHANGES

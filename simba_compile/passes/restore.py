"""Full-length values out of pruned ones (docs/method.md).

A token that leaves keeps its residual stream as it was on leaving. The stream is the chain of residual adds: each node
of it has one operand that is the stream before. Restoring a node of the stream lays the chain's values over each other,
the oldest, at full length, at the bottom; restoring anything that treats tokens apart computes it from restored inputs.
"""

import itertools
from typing import Any

import torch
from torch.fx import Graph, Node

from simba_compile.passes.edit import sizes
from simba_compile.passes.effects import is_inplace, storage_of, written
from simba_compile.passes.match import ADDS, Mixer
from simba_compile.passes.tokens import CASTS, NORMS, POINTWISE

_CHANGES: set[Any] = POINTWISE | NORMS | {"mean", torch.mean}  # a norm in parts has one


class Stream:
    """The residual stream of a graph: which adds belong to it, and which operand of each is the stream before.

    Parameters
    ----------
    graph : Graph
    mixers : iterable of Mixer
        Their residual adds are where the stream is known; other adds onto its values since the last of those (of an MLP,
        say) join by themselves, and so do those onto what scales or norms made of the stream. Adds onto an earlier one (the
        embedding once more) do not: the stream has left it behind. Nor do those that only change it: ``h + 0.1 * h`` scales.
    """

    def __init__(self, graph: Graph, mixers: tuple[Mixer, ...]) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        writes = (node for node in graph.nodes if is_inplace(node))
        self.changing = {storage_of(value) for node in writes for value in written(node)}
        self.before: dict[Node, Node] = {}
        # Its values since the last mixer, and above them those of a stream within a block, if one goes on there.
        self.chains: list[list[Node]] = []
        self.residuals = {mixer.add: mixer.residual for mixer in mixers if mixer.add and mixer.residual}

    def note(self, node: Node) -> None:
        """Take an add onto the stream into it."""
        if node in self.residuals:
            before = self.residuals[node]
        elif node.target in ADDS:
            sources = {self.uncast(source): source for source in node.all_input_nodes}
            found = self._stream_among(list(sources))
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

    def _stream_among(self, sources: list[Node]) -> Node | None:
        """Which of those that are added is the stream before, where one is and another is what a layer adds to it."""
        for chain in self.chains:
            base = next((value for value in reversed(chain) if value in sources), None)
            if base is not None:
                only_changed = all(self._is_change(other, base) for other in sources if other is not base)
                return None if only_changed else base
        for base, other in itertools.permutations(sources, 2):
            of_the_stream = any(
                self._is_change(base, chain[-1]) and sizes(base) == sizes(chain[-1]) for chain in self.chains
            )
            if of_the_stream and self._way(base, other) and not self._is_change(other, base):
                return base
        return None

    def _is_change(self, value: Node, base: Node) -> bool:
        """Whether all that a value has of another one came by scaling, norms and the like: through no layer."""
        way = self._way(base, value)
        return bool(way) and all(node.target in _CHANGES for node in way)

    def _way(self, base: Node, value: Node) -> list[Node]:
        """The nodes from one to another that is made of it, without the first; none where it is not."""
        found = [value]
        for node in found:  # grows while it is walked
            inputs = (source for source in node.all_input_nodes if self.place[source] > self.place[base])
            found += [source for source in inputs if source not in found]
        made = [base]
        for node in sorted(found, key=self.place.__getitem__):
            if any(source in made for source in node.all_input_nodes):
                made.append(node)
        return made[1:] if made[-1] is value else []

    def uncast(self, node: Node) -> Node:
        """What the node is a cast or a copy of, if it is one, and both stay as they are."""
        while node.target in CASTS and isinstance(node.args[0], Node):
            if self.changing & {storage_of(node), storage_of(node.args[0])}:
                break
            node = node.args[0]
        return node

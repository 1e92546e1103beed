"""Full-length values out of pruned ones (docs/method.md).

A token that leaves keeps its residual stream as it was on leaving. The stream is the chain of residual adds: each node
of it has one operand that is the stream before. Restoring a node of the stream lays the chain's values over each other,
the oldest, at full length, at the bottom; restoring anything that treats tokens apart computes it from restored inputs.
"""

from torch.fx import Graph, Node

from simba_compile.passes.effects import is_inplace, storage_of, written
from simba_compile.passes.match import ADDS, Mixer
from simba_compile.passes.tokens import CASTS


class Stream:
    """The residual stream of a graph: which adds belong to it, and which operand of each is the stream before.

    Parameters
    ----------
    graph : Graph
    mixers : iterable of Mixer
        Their residual adds are where the stream is known; other adds onto its values since the last of those (of an MLP,
        say) join by themselves. Adds onto an earlier one (the embedding once more) do not: the stream has left it behind.
    """

    def __init__(self, graph: Graph, mixers: tuple[Mixer, ...]) -> None:
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
            base = self.uncast(before)
            if not any(base in chain for chain in self.chains):
                self.chains.append([base])  # what something made of the stream: the stream from here on, or within a block
            place = next(i for i, chain in enumerate(self.chains) if base in chain)
            values = [node]
        elif node.target in ADDS:
            sources = {self.uncast(source): source for source in node.all_input_nodes}
            place = next((i for i, chain in enumerate(self.chains) if sources.keys() & set(chain)), -1)
            if place < 0:
                return
            chain = self.chains[place]  # with values of two, the inner stream ends here
            before = next(sources[value] for value in reversed(chain) if value in sources)
            values = [*chain, node]
        else:
            return
        self.before[node] = before
        self.chains[place:] = [values]

    def uncast(self, node: Node) -> Node:
        """What the node is a cast or a copy of, if it is one, and both stay as they are."""
        while node.target in CASTS and isinstance(node.args[0], Node):
            if self.changing & {storage_of(node), storage_of(node.args[0])}:
                break
            node = node.args[0]
        return node

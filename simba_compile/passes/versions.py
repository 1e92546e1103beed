"""The values of the pruned graph, each in the versions that something reads.

A *version* is how many prunings a value has gone through; 0 is full length. A newer version is gathered out of an older
one; an older one is put together as `restore` says.
"""

import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from simba_compile.passes.attention import SAME_DATA
from simba_compile.passes.effects import is_random, storage_of
from simba_compile.passes.length import NO_TOKENS, expression, value_of
from simba_compile.passes.match import name_of
from simba_compile.passes.modes import Modes
from simba_compile.passes.plan import Plan
from simba_compile.passes.restore import Stream
from simba_compile.passes.scans import MIXER_OPERATORS
from simba_compile.passes.tokens import inputs_with_tokens, is_tokenwise, takes_sizes
from simba_compile.passes.walk import reached

OPS = torch.ops.simba


class Unprunable(Exception):
    """A mixer cannot prune in this graph; it and those after it stay dense."""

    def __init__(self, mixer: int, reason: str) -> None:
        super().__init__(reason)
        self.mixer = mixer


class Versions:
    """The values of a graph that are written for the pruned one.

    Parameters
    ----------
    graph : Graph
        The old graph.
    plan : Plan
        Of its mixers.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.length, self.stream = plan.length, Stream(graph, plan.mixers)
        self.out = Graph()
        self.version: dict[Node, int] = {}  # of every node of the old graph that was visited: its newest
        self.made: dict[tuple[Node, int], Node] = {}  # (old node, version) → new node
        self.derived: set[tuple[Node, int]] = set()  # those of `made` that `at` made
        self.counts: list[Node] = []  # version 1 is entry 0: how many tokens are left,
        self.kept: list[Node] = []  # … their places among the tokens of the version before,
        self.positions: dict[int, Node] = {}  # version → their places in the sequence, where something asks for them
        self.tokens: Node | None = None  # the full length as a number
        self.mixer = 0  # the last one that pruned: whom a failure is laid to
        self.reader: Node | None = None  # the node that the walk has come to, for which others are made
        self.cached: set[Node] = set()  # keys and values that attention reads and the graph returns
        self.whole: dict[Node, None] = {}  # what was gathered out of its value for all tokens, in order
        self.read: dict[int | None, Node] = {}  # memory that a value of pruned tokens was made of, and that value
        self.modes = Modes()

    @property
    def latest(self) -> int:
        """The version of the tokens that the walk has come to."""
        return len(self.kept)

    def cannot(self, node: Node, reason: str) -> Unprunable:
        """The error for a value that is not defined for pruned tokens."""
        return Unprunable(self.mixer, f"{name_of(node)} {reason}")

    def cannot_restore(self, node: Node, reason: str) -> Unprunable:
        """The error for a value that the reader needs at full length."""
        reader = "" if self.reader is None or self.reader.op == "output" else f" by {name_of(self.reader)}"
        return self.cannot(node, f"is needed for all tokens{reader}{reason}")

    # --- writing a value -------------------------------------------------------------------------------------------------

    def set_version(self, node: Node, version: int) -> None:
        """Note which version a node's value is first written in."""
        self.version[node] = version
        if version > 0:
            for source in node.all_input_nodes:
                self.read.setdefault(storage_of(source), node)

    def emit(self, node: Node, version: int, sized: bool = False) -> None:
        """Write a node in this version; `sized`: its numbers are sizes (see `_copy`)."""
        self.set_version(node, version)
        self.made[node, version] = self._copy(node, version, sized)

    def _copy(self, node: Node, version: int, sized: bool = False) -> Node:
        """The node on inputs of this version. The length as an operand, and not as a size, stays the length."""
        sized = sized or takes_sizes(node)
        if version == 0 and node.target not in SAME_DATA and not self.length.is_square(value_of(node)):  # which are weights
            cached = self.cached.intersection(node.all_input_nodes) - self.stream.values
            if any(self.version[source] > 0 for source in cached):  # a step would read marks there
                raise self.cannot(node, "reads keys or values of attention for all tokens")
        return self.out.node_copy(
            node, lambda source: self.at(source, version if sized or not self.length.is_number(source) else 0)
        )

    def call(self, target: Any, *args: Any) -> Node:
        """Write a call."""
        return self.out.call_function(target, args)

    # --- a value in another version ----------------------------------------------------------------------------------

    def at(self, node: Node, version: int) -> Node:
        """The new graph's node for a value in this version."""
        if self.length.is_number(node):
            return self._number(node, version)
        have = self.version[node]
        if self.length.of(node) == NO_TOKENS:
            return self.made[node, have]
        if (node, version) not in self.made:
            later = version > have
            new = self._gather(node, have, version) if later else self._restore(node, version)
            new.meta = dict(node.meta)  # its sizes are those of the full length: only dtypes and ranks are read from here
            self.made[node, version] = new
            self.derived.add((node, version))
        return self.made[node, version]

    def _number(self, node: Node, version: int) -> Node:
        """A size that depends on the length: the same expression of the version's count."""
        value = value_of(node)
        if isinstance(value, torch.SymInt) and expression(value) == self.length.tokens:
            count = self.counts[version - 1] if version else self.tokens
            assert count is not None
            return count
        if (node, version) not in self.made:
            if node.op == "placeholder":
                raise Unprunable(self.mixer, f"the size {value} is a part of the length, and not defined for pruned tokens")
            self.made[node, version] = self.out.node_copy(node, lambda source: self.at(source, version))
        return self.made[node, version]

    def full_length(self, inputs: list[Node]) -> Node:
        """Write the length as the sum of the sizes that the inputs show."""
        try:
            places = self.length.find(inputs)
        except ValueError as error:  # the length is made in the graph, from a number that is read off a tensor
            raise Unprunable(0, str(error)) from None
        sizes: list[Any] = []
        for place, axis in places:
            made = self.made[inputs[place], 0]
            sizes.append(made if axis is None else self.call(torch.ops.aten.sym_size.int, made, axis))
        sizes += [int(self.length.fixed)] * (self.length.fixed != 0)
        return functools.reduce(lambda total, size: self.call(operator.add, total, size), sizes)

    def _gather(self, node: Node, have: int, version: int) -> Node:
        axis, value = self.length.of(node), value_of(node)
        have_batch = self.length.batch_axis(value) == 0 or self.length.is_shared(value)
        if axis < 1 or not have_batch:  # FLAT is less, too
            raise self.cannot(node, f"has tokens that cannot be gathered: it is {list(value.shape)}")
        if have == 0:
            self.whole[node] = None
            return self.call(OPS.gather, self.made[node, 0], self.places(version), axis)
        return self.call(OPS.gather, self.at(node, version - 1), self.kept[version - 1], axis)

    def _restore(self, node: Node, version: int) -> Node:
        """The value at full length, where a token that left is what it was on leaving."""
        if version != 0:
            raise self.cannot(node, "would be needed with more tokens than it has")
        for value in self._restored_for(node):
            self.at(value, 0)
        if node in self.stream.before:
            return self._restore_stream(node)
        if not self._is_computed_anew(node):
            raise self.cannot_restore(node, ", and is not defined for pruned ones")
        mode = self.modes.of[node]
        if mode != self.modes.present:
            if not self.modes.leads_to(mode):
                raise self.cannot_restore(node, " within a no_grad or autocast of others")
            outside = self.take_derived()
            with self.modes.switched_to(mode, self.out):
                new = self._restore(node, version)
                self.take_derived()
            self.made |= outside
            self.derived |= outside.keys()
            return new
        if not is_random(node):
            return self._copy(node, 0)
        if self.length.of(node) != 1:
            raise self.cannot_restore(node, ", and draws random numbers")
        have = self.version[node]  # the tokens of this version have theirs already
        return self.call(OPS.restore, self._copy(node, 0), [self.made[node, have]], [self.places(have)])

    def _is_computed_anew(self, node: Node) -> bool:
        """Whether it is restored by computing it from restored inputs."""
        return node.target not in MIXER_OPERATORS and is_tokenwise(node, self.length)

    def _restored_for(self, node: Node) -> list[Node]:
        """What else is restored for a value's sake, the oldest first: one for the sake of the next would go too deep."""

        def sources(value: Node) -> list[Node]:
            if value in self.stream.before:
                of = [self._streams_below(value)[-1]]
            elif not self._is_computed_anew(value):
                of = []
            else:
                of = list(inputs_with_tokens(value, self.length))
            pruned = [source for source in of if self.version[source] > 0 and (source, 0) not in self.made]
            return [source for source in pruned if self.modes.of[source] == self.modes.present]

        return sorted(set(reached([node], sources)) - {node}, key=self.stream.place.__getitem__)

    def _streams_below(self, node: Node) -> list[Node]:
        """A value of the stream and those before it, down to one that has all tokens or was made of an earlier stream."""
        found = [node]
        while found[-1] in self.stream.before and self.version[found[-1]] > 0 and (found[-1], 0) not in self.made:
            found.append(self.stream.uncast(self.stream.before[found[-1]]))
        return found

    def _restore_stream(self, node: Node) -> Node:
        if self.length.of(node) != 1:
            raise self.cannot(node, f"is the residual stream, and has its tokens in axis {self.length.of(node)}")
        layers: dict[int, Node] = {}  # version → the last value of the stream in it
        *above, node = self._streams_below(node)
        for value in above:
            for version in range(self.version[value], 0, -1):  # "layer": the add also stands in the version before
                if (value, version) in self.made:
                    layers.setdefault(version, self.made[value, version])
        order = sorted(layers)
        positions = [self.places(version) for version in order]
        return self.call(OPS.restore, self.at(node, 0), [layers[version] for version in order], positions)

    def places(self, version: int) -> Node:
        """Where in the sequence the tokens of a version stand."""
        if version == 1:
            return self.kept[0]
        if version not in self.positions:
            before = self.places(version - 1)
            self.positions[version] = self.call(OPS.gather, before, self.kept[version - 1], 1)
        return self.positions[version]

    def drop_unread(self) -> None:
        """Erase what was written for pruned tokens and then only read at full length: the head, for all the logits."""
        for (node, version), made in reversed(self.made.items()):
            if version > 0 and (node, 0) in self.made and not made.users and not is_random(node):
                self.out.erase_node(made)

    def take_derived(self) -> dict[tuple[Node, int], Node]:
        """Forget what `at` made, and return it."""
        taken = {key: self.made.pop(key) for key in self.derived}
        self.derived.clear()
        return taken

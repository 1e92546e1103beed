"""Rewrite the graph so that what follows a pruning mixer runs on the tokens that it keeps.

Before:

    … ─ selective_scan(x, dt, A, B, C, D, z) ─ out_proj ─ + residual

After:

    scores = influence(x, dt, A, B, C)
    kept   = select(scores, n)
    … ─ selective_scan(gather(x, kept), gather(dt, kept), …) ─ out_proj ─ + gather(residual, kept)

Every value has a *version*: how many prunings it has gone through; 0 is full length. One rule brings everything else
along: a node takes the newest version among its inputs, and its older inputs are gathered. It holds for operations that
treat tokens alike and apart (`tokens.is_tokenwise`), for attention (`attention`), and for what stands between the marks that
`capture` sets around a mixture of experts. Any other operation, and the graph's output, sees full-length values, which
are put together as `restore` says.
"""

import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from simba_compile.options import Options
from simba_compile.passes.attention import SAME_DATA, entries, is_attention, query_and_mask, why_not
from simba_compile.passes.effects import is_inplace, is_random, storage_of, written
from simba_compile.passes.length import NO_TOKENS, expression, value_of
from simba_compile.passes.match import name_of
from simba_compile.passes.modes import Modes
from simba_compile.passes.plan import Plan
from simba_compile.passes.restore import Stream
from simba_compile.passes.scans import MIXER_OPERATORS, SCANS
from simba_compile.passes.tokens import inputs_with_tokens, is_tokenwise, reorders, suffix, takes_sizes

OPS = torch.ops.simba


class Unprunable(Exception):
    """A mixer cannot prune in this graph; it and those after it stay dense."""

    def __init__(self, mixer: int, reason: str) -> None:
        super().__init__(reason)
        self.mixer = mixer


def prune(gm: GraphModule, plan: Plan, options: Options) -> GraphModule:
    """A copy of the graph in which the plan's mixers prune; it takes their counts as further inputs at the end.

    Raises
    ------
    Unprunable
        Where the graph needs a value that is not defined for pruned tokens.
    """
    return _Pruning(gm, plan, options).run()


class _Pruning:
    """One walk over a graph, which writes the pruned graph as it goes."""

    def __init__(self, gm: GraphModule, plan: Plan, options: Options) -> None:
        self.gm, self.plan, self.options, self.length = gm, plan, options, plan.length
        self.out = Graph()
        self.stream = Stream(gm.graph, plan.mixers)
        self.scans = {scan: i for i in plan.pruning for scan in plan.mixers[i].scans}  # and the mixer of each
        self.convolutions = {mixer.conv for mixer in plan.mixers if self.length.of(mixer.conv) >= 0}
        self.windows = {window: mixer.conv for mixer in plan.mixers for window in mixer.windows if mixer.conv}
        self.version: dict[Node, int] = {}  # of every node of the old graph
        self.made: dict[tuple[Node, int], Node] = {}  # (old node, version) → new node
        self.protect_last: int | Node = plan.protect_last
        self.counts: list[Node] = []  # version 1 is entry 0: how many tokens are left,
        self.kept: list[Node] = []  # … their places among the tokens of the version before,
        self.positions: dict[int, Node] = {}  # version → their places in the sequence, where something asks for them
        self.pending: Node | None = None  # placement "layer": selected at the scan, to be pruned at the residual add
        self.mixer = 0  # the last one that pruned: whom a failure is laid to
        self.experts: int | None = None  # the version inside a mixture of experts
        attentions = [node for node in gm.graph.nodes if is_attention(node)]
        # Keys and values that attention reads, now or later: as outputs, a cache's entries
        self.entries = {source for node in attentions for source in entries(node, plan.length)}
        self.masks: dict[tuple, Node] = {}  # of attention, for kept tokens
        self.tokens: Node | None = None  # the full length as a number
        self.derived: set[tuple[Node, int]] = set()  # those of `made` that `at` made
        self.read: dict[int | None, Node] = {}  # memory that a value of pruned tokens was made of, and that value
        self.modes = Modes()

    @property
    def latest(self) -> int:
        return len(self.kept)

    def _cannot(self, node: Node, reason: str) -> Unprunable:
        return Unprunable(self.mixer, f"{name_of(node)} {reason}")

    # --- the walk ----------------------------------------------------------------------------------------------------

    def run(self) -> GraphModule:
        nodes = list(self.gm.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in inputs:
            self._emit(node, 0)
        if self.plan.ends:
            self.protect_last = self.out.placeholder("protect_last")
        self.counts = [self.out.placeholder(f"kept_{i}") for i in self.plan.pruning]
        self.tokens = self._full_length(inputs)
        for node in nodes:
            self._visit(node)
        self._drop_unread()
        self.out.lint()
        return GraphModule(self.gm, self.out)

    def _visit(self, node: Node) -> None:
        if node in self.version:  # an input, or one that was needed earlier
            return
        if node.op == "output":
            self.out.node_copy(node, self._returned)
            return
        if self.modes.note(node):  # copies made under one mode do not serve under another
            self._take_derived()
        if self.length.is_number(node):
            self.version[node] = 0  # written where it is used, for the version that it is used in
            return
        mixer = self.scans.get(node)
        if mixer is not None and node is self.plan.mixers[mixer].scans[0]:
            self._select(mixer)
        newest = self._newest(node)
        if self._among_experts(node, newest):
            return
        if is_inplace(node):
            if newest > 0:
                raise self._cannot(node, "writes in place into a value that has lost tokens")
            self._check_write(node)
        if newest == 0:
            self._emit(node, 0)
        elif self._reads_the_end(node):
            self._emit_last_tokens(node, newest)
        elif is_attention(node):
            self._attend(node, newest)
        elif node.target in MIXER_OPERATORS:
            self._check_tokens(node)
            self._emit(node, newest)
        else:
            self._emit(node, newest if is_tokenwise(node, self.length) else 0)
        if node in self.stream.residuals:
            self._check_order(self.stream.residuals[node])
        self.stream.note(node)
        if self.pending is not None and node is self.plan.mixers[self.mixer].add:
            self._prune_layer(node)

    def _returned(self, node: Node) -> Node:
        """A result. Of a restored stream a view, which has no gradient: the tokens that stayed have gone on without it."""
        made = self.at(node, 0)
        if self.version[node] == 0 or node not in self.stream.before:
            return made
        view = self._call(torch.ops.aten.alias.default, made)
        view.meta = dict(made.meta)
        return view

    def _newest(self, node: Node) -> int:
        """The newest version among what a node reads; of a mixer's scan and convolution, the latest that there is."""
        if node in self.scans or node in self.convolutions:  # also behind what needs all tokens
            return self.latest
        versions = [self.version[source] for source in inputs_with_tokens(node, self.length)]
        if node in self.windows:
            versions.append(self.version.get(self.windows[node], self.latest))
        return max(versions, default=0)

    def _drop_unread(self) -> None:
        """Erase what was written for pruned tokens and then only read at full length: the head, for all the logits."""
        for (node, version), made in reversed(self.made.items()):
            if version > 0 and (node, 0) in self.made and not made.users and not is_random(node):
                self.out.erase_node(made)

    def _take_derived(self) -> dict[tuple[Node, int], Node]:
        """Forget what `at` made, and return it."""
        taken = {key: self.made.pop(key) for key in self.derived}
        self.derived.clear()
        return taken

    def _check_tokens(self, node: Node) -> None:
        """A scan, or a convolution, of pruned tokens has its tokens where it is taken to have them."""
        if not is_tokenwise(node, self.length):
            raise self._cannot(node, "has tokens that cannot be told from its other axes")

    def _check_write(self, node: Node) -> None:
        """Pruned tokens read gathered copies and full-length values are computed late: none may be written to since."""
        for place in {storage_of(value) for value in written(node)} - {None} & self.read.keys():
            reader = self.read[place]
            raise self._cannot(node, f"writes in place into what {name_of(reader)} read for pruned tokens")

    def _check_order(self, residual: Node) -> None:
        """What a mixer is added onto has its tokens in their places: else those that stay would be others from here on."""
        for node in self._made_of(residual):
            if reorders(node, self.length) and any(self.version[source] > 0 for source in self._made_of(node)):
                raise self._cannot(node, "may put tokens in another order")

    def _made_of(self, node: Node) -> list[Node]:
        """The node and the values with tokens that it is made of, back to the stream."""
        found = [node]
        for value in found:  # grows while it is walked
            if value not in self.stream.before:
                found += [source for source in inputs_with_tokens(value, self.length) if source not in found]
        return found

    def _set_version(self, node: Node, version: int) -> None:
        self.version[node] = version
        if version > 0:
            for source in node.all_input_nodes:
                self.read.setdefault(storage_of(source), node)

    def _emit(self, node: Node, version: int, sized: bool = False) -> None:
        self._set_version(node, version)
        self.made[node, version] = self._copy(node, version, sized)

    def _copy(self, node: Node, version: int, sized: bool = False) -> Node:
        """The node on inputs of this version. The length as an operand, and not as a size, stays the length."""
        sized = sized or takes_sizes(node)
        if version == 0 and node.target not in SAME_DATA:  # a cache may take its entries with marks; what computes may not
            marked = self.entries.intersection(node.all_input_nodes) - self.stream.before.keys()
            if any(self.version[source] > 0 for source in marked):
                raise self._cannot(node, "reads keys or values of attention for all tokens")
        return self.out.node_copy(
            node, lambda source: self.at(source, version if sized or not self.length.is_number(source) else 0)
        )

    def _call(self, target: Any, *args: Any) -> Node:
        return self.out.call_function(target, args)

    # --- attention and experts ---------------------------------------------------------------------------------------

    def _attend(self, node: Node, newest: int) -> None:
        """Attention among the kept tokens: queries, keys and values in the newest version, the mask's two axes as well."""
        reason = why_not(node, self.length)
        if reason is not None:
            raise Unprunable(self.mixer, reason)
        query, mask = query_and_mask(node)
        if isinstance(mask, Node) and self.version[mask] == 0:
            rank = max(value_of(query).dim(), value_of(mask).dim())
            key = mask, rank, newest, self.modes.present
            if key not in self.masks:
                self.masks[key] = self._mask(mask, rank, newest)
            self.made[mask, newest] = self.masks[key]
        self._emit(node, newest)

    def _mask(self, mask: Node, rank: int, version: int) -> Node:
        """A mask of attention with as many axes as the scores: of its queries, if it tells them apart, and of its keys."""
        made, value = self.made[mask, 0], value_of(mask)
        if value.dim() < rank:  # it is one for all sequences
            made = self._call(operator.getitem, made, (*(None,) * (rank - value.dim()), ...))
        for axis in (rank - 2, rank - 1):
            if expression(value.shape[axis - rank]) == self.length.tokens:
                made = self._call(OPS.gather, made, self._positions(version), axis)
        made.meta = dict(mask.meta)
        return made

    def _among_experts(self, node: Node, newest: int) -> bool:
        """Between the marks, what treats rows as a set (sorts and counts them) gives each token what it gave it before."""
        if node.target is OPS.enter_experts and newest > 0:
            self.experts = newest
        if self.experts is None:
            return False
        self._emit(node, self.experts, sized=True)
        if node.target is OPS.leave_experts:
            self.experts = None
        return True

    # --- scoring and selecting ---------------------------------------------------------------------------------------

    def _select(self, mixer: int) -> None:
        """Score before the scans of a pruning mixer, and select. What follows has a newer version."""
        if self.pending is not None:
            raise Unprunable(mixer, "another mixer stands between this one's scan and its residual add")
        self.mixer = mixer
        scans = self.plan.mixers[mixer].scans
        for scan in scans:
            self._check_tokens(scan)
        for scan in scans[1:]:  # what other heads scan is made after the first head's scan
            self._visit_before(scan)
        count = self.counts[self.latest]
        if self.options.criterion == "influence":
            scores = self._influence(scans[0])
            for scan in scans[1:]:
                scores = self._call(OPS.pool_heads, scores, self._influence(scan), self.options.pool)
        else:
            seed = self.options.seed + mixer
            x = self.at(scans[0].args[0], self.latest)  # type: ignore[arg-type]
            scores = self._call(OPS.token_scores, x, count, self.options.criterion, seed)
        kept = self._call(OPS.select, scores, count, self.plan.protect_first, self.protect_last)
        if self.options.placement == "scan":
            self.kept.append(kept)
        else:
            self.pending = kept

    def _influence(self, scan: Node) -> Node:
        kind = SCANS[scan.target]  # type: ignore[index]
        scored = kind.scored_of(scan.args)
        given = [self.at(value, self.latest) if isinstance(value, Node) else value for value in scored]
        return self._call(kind.influence, *given, self.options.pool, self.options.dt_bias == "include")

    def _visit_before(self, node: Node) -> None:
        """Visit what a node is made of, ahead of its turn."""
        for source in node.all_input_nodes:
            if source not in self.version:
                self._visit_before(source)
                self._visit(source)

    def _prune_layer(self, add: Node) -> None:
        """Placement "layer": the residual add's result loses the tokens that its mixer did not select."""
        if self.version[add] != self.latest:
            raise Unprunable(self.mixer, "the layer's output does not have the tokens that its scan ran on")
        kept, self.pending = self.pending, None
        whole = self.made[add, self.latest]
        assert kept is not None
        self.kept.append(kept)
        self._set_version(add, self.latest)
        pruned = self.made[add, self.latest] = self._call(OPS.gather, whole, kept, self.length.of(add))
        pruned.meta = dict(add.meta)

    def _positions(self, version: int) -> Node:
        """Where in the sequence the tokens of a version stand."""
        if version == 1:
            return self.kept[0]
        if version not in self.positions:
            before = self._positions(version - 1)
            self.positions[version] = self._call(OPS.gather, before, self.kept[version - 1], 1)
        return self.positions[version]

    # --- reading the end of the sequence -----------------------------------------------------------------------------

    def _reads_the_end(self, node: Node) -> bool:
        """Whether it takes the last tokens, which are protected, or a window that a cache keeps for the convolution."""
        if node in self.windows:
            return True
        k = suffix(node, self.length)
        return k is not None and self.plan.protects(k) and self.length.of(node) == NO_TOKENS

    def _emit_last_tokens(self, node: Node, version: int) -> None:
        source: Node = node.args[0]  # type: ignore[assignment]
        last: Any = suffix(node, self.length)
        place = self.plan.ends.get(expression(last))
        if place is not None:
            last = self.made[self.gm.graph.find_nodes(op="placeholder")[place], 0]
        new = self._call(OPS.last_tokens, self.at(source, version), last, self.length.of(source))
        new.meta = dict(node.meta)
        self.version[node] = 0  # no token axis is left to be gathered along
        self.made[node, 0] = new

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

    def _full_length(self, inputs: list[Node]) -> Node:
        try:
            places = self.length.find(inputs)
        except ValueError as error:  # the length is made in the graph, from a number that is read off a tensor
            raise Unprunable(0, str(error)) from None
        sizes: list[Any] = []
        for place, axis in places:
            made = self.made[inputs[place], 0]
            sizes.append(made if axis is None else self._call(torch.ops.aten.sym_size.int, made, axis))
        sizes += [int(self.length.fixed)] * (self.length.fixed != 0)
        return functools.reduce(lambda total, size: self._call(operator.add, total, size), sizes)

    def _gather(self, node: Node, have: int, version: int) -> Node:
        axis, value = self.length.of(node), value_of(node)
        have_batch = self.length.batch_axis(value) == 0 or self.length.is_shared(value)
        if axis < 1 or not have_batch:  # FLAT is less, too
            raise self._cannot(node, f"has tokens that cannot be gathered: it is {list(value.shape)}")
        if have == 0:
            return self._call(OPS.gather, self.made[node, 0], self._positions(version), axis)
        return self._call(OPS.gather, self.at(node, version - 1), self.kept[version - 1], axis)

    def _restore(self, node: Node, version: int) -> Node:
        """The value at full length, where a token that left is what it was on leaving."""
        if version != 0:
            raise self._cannot(node, "would be needed with more tokens than it has")
        if node in self.stream.before:
            return self._restore_stream(node)
        if node in self.entries:
            have = self.version[node]
            where = (self._positions(have), self.tokens, self.length.of(node))
            return self._call(OPS.cache_entries, self.made[node, have], *where)
        if node.target in MIXER_OPERATORS or not is_tokenwise(node, self.length):
            raise self._cannot(node, "is needed for all tokens, and is not defined for pruned ones")
        mode = self.modes.of[node]
        if mode != self.modes.present:
            if not self.modes.leads_to(mode):
                raise self._cannot(node, "is needed for all tokens within a no_grad or autocast of others")
            outside = self._take_derived()
            with self.modes.switched_to(mode, self.out):
                new = self._restore(node, version)
                self._take_derived()
            self.made |= outside
            self.derived |= outside.keys()
            return new
        if not is_random(node):
            return self._copy(node, 0)
        if self.length.of(node) != 1:
            raise self._cannot(node, "is needed for all tokens, and draws random numbers")
        have = self.version[node]  # the tokens of this version have theirs already
        return self._call(OPS.restore, self._copy(node, 0), [self.made[node, have]], [self._positions(have)])

    def _restore_stream(self, node: Node) -> Node:
        if self.length.of(node) != 1:
            raise self._cannot(node, f"is the residual stream, and has its tokens in axis {self.length.of(node)}")
        layers: dict[int, Node] = {}  # version → the last value of the stream in it
        while node in self.stream.before and self.version[node] > 0 and (node, 0) not in self.made:
            for version in range(self.version[node], 0, -1):  # "layer": the add also stands in the version before
                if (node, version) in self.made:
                    layers.setdefault(version, self.made[node, version])
            node = self.stream.uncast(self.stream.before[node])
        if node in self.entries and node not in self.stream.before:  # at full length it has marks
            raise self._cannot(node, "is needed for all tokens, and attention reads it as keys or values")
        order = sorted(layers)
        positions = [self._positions(version) for version in order]
        return self._call(OPS.restore, self.at(node, 0), [layers[version] for version in order], positions)

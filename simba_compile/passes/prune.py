"""Rewrite the graph so that what follows a pruning mixer runs on the tokens that it keeps.

Before:

    … ─ selective_scan(x, dt, A, B, C, D, z) ─ out_proj ─ + residual

After:

    scores = influence(x, dt, A, B, C)
    kept   = select(scores, n)
    … ─ selective_scan(gather(x, kept), gather(dt, kept), …) ─ out_proj ─ + gather(residual, kept)

Every value has a *version*: how many prunings it has gone through (`versions`). One rule brings everything else along: a
node takes the newest version among its inputs, and its older inputs are gathered. It holds for operations that treat tokens
alike and apart (`tokens.is_tokenwise`), for attention (`attention`), and for what stands between the marks that `capture`
sets around a mixture of experts. Any other operation, and the graph's output, sees full-length values.
"""

import operator
from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from simba_compile.options import Options
from simba_compile.passes.attention import copied, entries, is_attention, query_and_mask, reads_others, why_not
from simba_compile.passes.effects import is_inplace, storage_of, written
from simba_compile.passes.length import NO_TOKENS, expression, value_of
from simba_compile.passes.match import name_of
from simba_compile.passes.plan import Plan
from simba_compile.passes.scans import MIXER_OPERATORS, SCANS
from simba_compile.passes.tokens import inputs_with_tokens, is_one_result, is_tokenwise, reorders, suffix
from simba_compile.passes.versions import OPS, Unprunable, Versions
from simba_compile.passes.walk import reached

NOT_TOLD = "a step could not tell which tokens have left"


def prune(gm: GraphModule, plan: Plan, options: Options) -> tuple[GraphModule, list[str]]:
    """A copy of the graph in which the plan's mixers prune; it takes the plan's `inputs` after its own.

    Also the names of what runs on all tokens there, between what runs on those that are left.

    Raises
    ------
    Unprunable
        Where the graph needs a value that is not defined for pruned tokens.
    """
    pruning = _Pruning(gm, plan, options)
    return pruning.run(), pruning.on_all_tokens()


class _Pruning(Versions):
    """One walk over a graph, which writes the pruned graph as it goes."""

    def __init__(self, gm: GraphModule, plan: Plan, options: Options) -> None:
        super().__init__(gm.graph, plan)
        self.gm, self.plan, self.options = gm, plan, options
        self.scans = {scan: i for i in plan.pruning for scan in plan.mixers[i].scans}  # and the mixer of each
        self.convolutions = {mixer.conv for mixer in plan.mixers if self.length.of(mixer.conv) >= 0}
        self.windows = {window: mixer.conv for mixer in plan.mixers for window in mixer.windows if mixer.conv}
        self.protect_last: int | Node = plan.protect_last
        self.pending: Node | None = None  # placement "layer": selected at the scan, to be pruned at the residual add
        self.experts: int | None = None  # the version inside a mixture of experts
        self.masks: dict[tuple, Node] = {}  # of attention, for kept tokens
        self.attended: dict[Node, int] = {}  # keys, values and what they are copies of → the version that attention reads
        # What the graph returns, and what that is copied from, back to keys and values: a step may read it as a cache.
        nodes = gm.graph.nodes
        read = {part for node in nodes if is_attention(node) for part in entries(node, self.length)}
        results = gm.graph.output_node().all_input_nodes
        self.returned = set(reached(results, lambda node: () if node in read or is_one_result(node) else copied(node)))
        self.cached = read & self.returned

    # --- the walk ----------------------------------------------------------------------------------------------------

    def run(self) -> GraphModule:
        nodes = list(self.gm.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in inputs:
            self.emit(node, 0)
        if self.plan.ends:
            self.protect_last = self.out.placeholder("protect_last")
        self.counts = [self.out.placeholder(f"kept_{i}") for i in self.plan.pruning]
        self.tokens = self.full_length(inputs)
        for node in nodes:
            self._visit(node)
        self.drop_unread()
        self.out.lint()
        return GraphModule(self.gm, self.out)

    def on_all_tokens(self) -> list[str]:
        """The names of what read values of pruned tokens at full length, and is read for those that are left."""

        def whole(node: Node) -> list[Node]:
            return [source for source in inputs_with_tokens(node, self.length) if self.version[source] == 0]

        found = reached(self.whole, whole)
        return [name_of(node) for node in found if len(whole(node)) < len(list(inputs_with_tokens(node, self.length)))]

    def _visit(self, node: Node) -> None:
        if node in self.version:  # an input, or one that was needed earlier
            return
        self.reader = node
        if node.op == "output":
            self.out.node_copy(node, self._returned)
            return
        if self.modes.note(node):  # copies made under one mode do not serve under another
            self.take_derived()
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
                raise self.cannot(node, "writes in place into a value that has lost tokens")
            self._check_write(node)
        parts = entries(node, self.length) if is_attention(node) else ()
        for part in parts:
            self.attended[part] = min(newest, self.attended.get(part, newest))
        among_pruned = is_attention(node) and (newest > 0 or any(self.version[part] > 0 for part in parts))
        if among_pruned and not reads_others(node, self.length):
            self._attend(node, newest)
        elif newest == 0:
            self.emit(node, 0)
        elif self._reads_the_end(node):
            self._emit_last_tokens(node, newest)
        elif node.target in MIXER_OPERATORS:
            self._check_tokens(node)
            self.emit(node, newest)
        else:
            self.emit(node, newest if is_attention(node) or is_tokenwise(node, self.length) else 0)
        if node in self.stream.residuals:
            self._check_order(self.stream.residuals[node])
        self.stream.note(node)
        if self.pending is not None and node is self.plan.mixers[self.mixer].add:
            self._prune_layer(node)

    def _returned(self, node: Node) -> Node:
        """A result. Of a restored stream a view, which has no gradient: the tokens that stayed have gone on without it."""
        version = self._attended(reached([node], lambda value: () if value in self.stream.values else copied(value)))
        if version > 0:
            return self._cached(node, version)
        if self.length.of(node) >= 0 and self._attended(self._made_of(node)) > 0:
            raise self.cannot(node, f"is returned, and computed from attention's keys or values: {NOT_TOLD}")
        made = self.at(node, 0)
        if self.version[node] == 0 or node not in self.stream.before:
            return made
        view = self.call(torch.ops.aten.alias.default, made)
        view.meta = dict(made.meta)
        return view

    def _attended(self, values: Iterable[Node]) -> int:
        """The first version in which attention read one of these as keys or values; 0 where none did, or for all tokens."""
        read = [value for value in values if value in self.attended and value not in self.stream.values]
        return min(map(self.attended.__getitem__, read), default=0)

    def _cached(self, node: Node, version: int) -> Node:
        """Keys or values, or copies of them, as attention in this version read them: entries of pruned tokens are marked."""
        axis, parts = self.length.of(node), copied(node)
        if axis >= 1 and self.length.batch_axis(value_of(node)) == 0:
            made = self.call(OPS.cache_entries, self.at(node, version), self.places(version), self.tokens, axis)
        elif parts:  # a window, or in an order of axes of its own
            made = self.out.node_copy(
                node, lambda value: self._cached(value, version) if value in parts else self.at(value, 0)
            )
        elif axis == NO_TOKENS:
            return self.at(node, 0)
        else:
            raise self.cannot(node, f"is made attention's keys or values, and is {list(value_of(node).shape)}")
        made.meta = dict(node.meta)
        return made

    def _newest(self, node: Node) -> int:
        """The newest version among what a node reads; of a mixer's scan and convolution, the latest that there is."""
        if node in self.scans or node in self.convolutions:  # also behind what needs all tokens
            return self.latest
        versions = [self.version[source] for source in inputs_with_tokens(node, self.length)]
        if node in self.windows:
            versions.append(self.version.get(self.windows[node], self.latest))
        return max(versions, default=0)

    def _check_tokens(self, node: Node) -> None:
        """A scan, or a convolution, of pruned tokens has its tokens where it is taken to have them."""
        if not is_tokenwise(node, self.length):
            raise self.cannot(node, "has tokens that cannot be told from its other axes")

    def _check_write(self, node: Node) -> None:
        """Pruned tokens read gathered copies and full-length values are computed late: none may be written to since."""
        for place in {storage_of(value) for value in written(node)} - {None} & self.read.keys():
            reader = self.read[place]
            raise self.cannot(node, f"writes in place into what {name_of(reader)} read for pruned tokens")

    def _check_order(self, residual: Node) -> None:
        """What a mixer is added onto has its tokens in their places: else those that stay would be others from here on."""
        for node in self._made_of(residual, past_attention=True):
            made = self._made_of(node, past_attention=True)
            if reorders(node, self.length) and any(self.version[source] > 0 for source in made):
                raise self.cannot(node, "may put tokens in another order")

    def _made_of(self, *nodes: Node, past_attention: bool = False) -> Iterator[Node]:
        """The nodes and the values with tokens that they are made of, back to the stream."""
        ends = self.stream.values

        def sources(node: Node) -> Iterable[Node]:
            stops = node in ends or (is_attention(node) and not past_attention)
            return () if stops else inputs_with_tokens(node, self.length)

        return reached(nodes, sources)

    # --- attention and experts ---------------------------------------------------------------------------------------

    def _attend(self, node: Node, newest: int) -> None:
        """Attention among the kept tokens: queries, keys and values in the newest version, the mask's two axes as well."""
        reason = why_not(node, self.length)
        if reason is not None:
            raise Unprunable(self.mixer, reason)
        if newest == 0:
            raise self.cannot(node, "reads keys or values of attention for all tokens")
        self._check_cached(node)
        query, mask = query_and_mask(node)
        if isinstance(mask, Node) and self.version[mask] == 0:
            rank = max(value_of(query).dim(), value_of(mask).dim())
            key = mask, rank, newest, self.modes.present
            if key not in self.masks:
                self.masks[key] = self._mask(mask, rank, newest)
            self.made[mask, newest] = self.masks[key]
        self.emit(node, newest)

    def _check_cached(self, attention: Node) -> None:
        """Nothing is returned that keys or values are computed from: in that, no step could tell which tokens have left."""
        parts, values = entries(attention, self.length), self.stream.values
        for node in self._made_of(*parts):
            if node in self.returned - parts - values and not values.isdisjoint(self._made_of(node)):
                raise self.cannot(node, f"is returned, and attention's keys or values are computed from it: {NOT_TOLD}")

    def _mask(self, mask: Node, rank: int, version: int) -> Node:
        """A mask of attention with as many axes as the scores: of its queries, if it tells them apart, and of its keys."""
        made, value = self.made[mask, 0], value_of(mask)
        if value.dim() < rank:  # it is one for all sequences
            made = self.call(operator.getitem, made, (*(None,) * (rank - value.dim()), ...))
        for axis in (rank - 2, rank - 1):
            if expression(value.shape[axis - rank]) == self.length.tokens:
                made = self.call(OPS.gather, made, self.places(version), axis)
        made.meta = dict(mask.meta)
        return made

    def _among_experts(self, node: Node, newest: int) -> bool:
        """Between the marks, what treats rows as a set (sorts and counts them) gives each token what it gave it before."""
        if node.target is OPS.enter_experts and newest > 0:
            self.experts = newest
        if self.experts is None:
            return False
        self.emit(node, self.experts, sized=True)
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
                scores = self.call(OPS.pool_heads, scores, self._influence(scan), self.options.pool)
        else:
            seed = self.options.seed + mixer
            x = self.at(scans[0].args[0], self.latest)  # type: ignore[arg-type]
            scores = self.call(OPS.token_scores, x, count, self.options.criterion, seed)
        kept = self.call(OPS.select, scores, count, self.plan.protect_first, self.protect_last)
        if self.options.placement == "scan":
            self.kept.append(kept)
        else:
            self.pending = kept

    def _influence(self, scan: Node) -> Node:
        kind = SCANS[scan.target]  # type: ignore[index]
        scored = kind.scored_of(scan.args)
        given = [self.at(value, self.latest) if isinstance(value, Node) else value for value in scored]
        return self.call(kind.influence, *given, self.options.pool, self.options.dt_bias == "include")

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
        self.set_version(add, self.latest)
        pruned = self.made[add, self.latest] = self.call(OPS.gather, whole, kept, self.length.of(add))
        pruned.meta = dict(add.meta)

    # --- reading the end of the sequence -----------------------------------------------------------------------------

    def _reads_the_end(self, node: Node) -> bool:
        """Whether it takes the last tokens, which are protected, or a window that a cache keeps for the convolution."""
        if node in self.windows:
            return True
        k = suffix(node, self.length)
        return k is not None and self.plan.protects(k) and self.length.of(node) == NO_TOKENS

    def _emit_last_tokens(self, node: Node, version: int) -> None:
        source: Node = node.args[0]  # type: ignore[assignment]
        number = expression(suffix(node, self.length))
        place = self.plan.ends.get(number)
        last = int(number) if place is None else self.made[self.gm.graph.find_nodes(op="placeholder")[place], 0]
        new = self.call(OPS.last_tokens, self.at(source, version), last, self.length.of(source))
        new.meta = dict(node.meta)
        self.version[node] = 0  # no token axis is left to be gathered along
        self.made[node, 0] = new

"""The passes, in the order in which they run on a graph that `capture` left with ``simba`` nodes in it.

subgraphs   finds the graphs that higher-order operators run
arguments   name_calls: puts calls under one name
functional  make_functional: writes in-place operations as ordinary ones
arguments   place_arguments: puts arguments that are given by name in their places
functional  allow_any_layout: writes what depends on where numbers lie in memory so that it does not
rows        writes what is computed with the tokens last as operations on rows, one for each token
match       finds the mixers (find_mixers: also those inside)      → a record for each
multihead   writes PyTorch's modules of attention as what they compute
tables      gives tables of positions an axis for sequences
plain_attention  writes attention that the model computes by itself as PyTorch's
plan        decides how many tokens each of them keeps             → counts from a length
subgraphs   checkpoint_as_eager; then the graphs inside are lowered
prune       scores, selects, and lets what follows run on what is left (with `attention`; `versions` gathers and restores)
lower       fuses what belongs together

`match` and `plan` only read the graph. Logger ``simba_compile.passes`` shows the graph before and after the last.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from simba_compile.options import Options
from simba_compile.passes.arguments import name_calls, place_arguments
from simba_compile.passes.functional import allow_any_layout, make_functional
from simba_compile.passes.length import Length
from simba_compile.passes.lower import lower
from simba_compile.passes.match import Mixer
from simba_compile.passes.multihead import write_out
from simba_compile.passes.plain_attention import fuse_attention
from simba_compile.passes.plan import Plan, make_plan
from simba_compile.passes.prune import Unprunable, prune
from simba_compile.passes.rows import make_rows
from simba_compile.passes.subgraphs import checkpoint_as_eager, find_mixers, with_subgraphs
from simba_compile.passes.tables import widen_tables

log = logging.getLogger("simba_compile.passes")


@dataclasses.dataclass
class Transformed:
    """What the passes make of one graph.

    Attributes
    ----------
    dense : GraphModule
        The lowered graph on all tokens.
    pruned : GraphModule or None
        The lowered graph on the kept tokens, with the `plan`'s numbers as further inputs; None where nothing prunes.
    plan : Plan or None
        How many tokens stay.
    mixers : list of Mixer
        Every mixer that was found; ``mixer.reason`` says why one stays dense.
    options : Options
        What they were made with.
    on_all_tokens : list of str
        What in the pruned graph runs on all tokens, those that left too, though what follows runs on those that are left: no
        pass knows that it treats tokens alike and apart.
    """

    dense: GraphModule
    pruned: GraphModule | None
    plan: Plan | None
    mixers: list[Mixer]
    options: Options
    on_all_tokens: list[str]

    def of_call(self, args: Sequence[Any], tokens: int) -> tuple[GraphModule, list[int]]:
        """The graph for a call on so many tokens that do not end in padding, and the numbers that it takes besides."""
        numbers = [] if self.plan is None else self.plan.of_call(args).inputs(tokens)
        if self.pruned is None or numbers[-1] == tokens:
            return self.dense, []
        return self.pruned, numbers


def transform(gm: GraphModule, options: Options, partial: str | None = None) -> Transformed:
    """Run the passes on a graph; `gm` itself becomes the dense one. `partial` says why it is a part only: it stays dense."""
    graphs = with_subgraphs(gm)
    for each in graphs:
        name_calls(each.graph)
        make_functional(each.graph)
        place_arguments(each.graph)
        allow_any_layout(each.graph)
        make_rows(each.graph)
    mixers = find_mixers(gm)
    length = Length(mixers[0].x) if mixers and mixers[0].reason is None else None  # of a graph that may be pruned
    length = length if length is not None and length.is_symbolic else None
    for each in graphs:
        if length is not None:
            write_out(each.graph, length)
            widen_tables(each.graph, length)
        fuse_attention(each.graph, length)
    plan = make_plan(gm.graph, mixers, options, partial)
    for each in graphs:
        checkpoint_as_eager(each)
    for inner in graphs[1:]:
        lower(inner)
    pruned: GraphModule | None = None
    on_all_tokens: list[str] = []
    while plan is not None and plan.pruning:
        try:
            pruned, on_all_tokens = prune(gm, plan, options)
            break
        except Unprunable as reason:  # this mixer and those after it stay dense; those before it may still prune
            plan = plan.without(reason.mixer, str(reason))
    for name, graph in (("pruned", pruned), ("dense", gm)):
        if graph is not None:
            log.debug("%s, before lowering:\n%s", name, graph.graph)
            lower(graph)
            log.debug("%s, lowered:\n%s", name, graph.graph)
    return Transformed(gm, pruned, plan if pruned is not None else None, mixers, options, on_all_tokens)

"""Give what is one for all sequences an axis for them, so that each may be given the rows of the tokens that it keeps.

``x * cos``, (batch, head, token, channel) and (token, channel)  →  ``x * cos[None, None]``

So it is with tables of positions, in models that make them for the length and not for a batch.
"""

import operator

from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.passes.edit import insert_traced
from simba_compile.passes.length import NO_TOKENS, Length, value_of
from simba_compile.passes.tokens import POINTWISE


def widen_tables(graph: Graph, length: Length) -> None:
    """Run over a graph, in place."""
    for node in list(graph.nodes):
        value = value_of(node)
        if node.target not in POINTWISE or not isinstance(value, Tensor) or length.batch_axis(value) != 0:
            continue
        for table in node.all_input_nodes:
            missing = value.dim() - value_of(table).dim() if _is_table(table, length) else 0
            if missing > 0 and length.of(table) + missing == length.of(node):
                node.replace_input_with(table, insert_traced(node, operator.getitem, table, (*(None,) * missing, ...)))


def _is_table(node: Node, length: Length) -> bool:
    """Whether it has rows for tokens, but none for sequences."""
    value = value_of(node)
    return isinstance(value, Tensor) and length.axis(value) > NO_TOKENS and length.batch_axis(value) is None

"""Write attention that a model computes by itself as PyTorch's, which `attention` knows how to run on kept tokens.

So has transformers with ``attn_implementation="eager"``:

``softmax(q @ k.transpose(2, 3) * s + mask, -1) @ v``  →  ``scaled_dot_product_attention(q, k, v, mask, scale=s)``

Weights that something else reads (``output_attentions=True``) or that are dropped at random have to be computed: they stay.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from simba_compile.passes.edit import dtype_of, insert, may_move, replace, sizes
from simba_compile.passes.match import ADDS
from simba_compile.passes.tokens import MUL, PRODUCTS, TO_TYPE

_SOFTMAX = (F.softmax, torch.softmax, "softmax")


def fuse_attention(graph: Graph) -> None:
    """Run over a graph, in place."""
    for node in list(graph.nodes):
        if node.target in PRODUCTS and len(node.args) == 2 and len(sizes(node)) == 4:
            _fuse(node)


def _fuse(node: Node) -> None:
    weights, value = node.args
    softmax = _before(weights, F.dropout, *TO_TYPE)
    if softmax is None or softmax.target not in _SOFTMAX or _given(softmax, 1, "dim") not in (-1, 3):
        return
    scores, mask = _operands(_before(softmax.args[0], *TO_TYPE), ADDS)
    product, scale = _operands(_before(scores, *TO_TYPE), MUL)
    product = _before(product, *TO_TYPE)
    if product is None or product.target not in PRODUCTS or len(product.args) != 2:
        return
    query, key = product.args[0], _swapped(product.args[1])
    read = [query, key, value] if mask is None else [query, key, value, mask]
    if not all(isinstance(source, Node) for source in read) or not may_move(product, node, *read):
        return
    if len({dtype_of(source) for source in (*read, node)}) > 1 or dtype_of(scale) is not None:
        return
    (*before, queries, _), (*of_keys, keys, _), (*of_values, values, _) = (sizes(source) for source in read[:3])
    if not before == of_keys == of_values or keys != values:
        return
    if mask is not None and sizes(mask)[-2:] not in ([queries, keys], [1, keys]):
        return
    new = insert(node, F.scaled_dot_product_attention, query, key, value, mask, 0.0, False)
    new.kwargs = {"scale": 1.0 if scale is None else scale}
    replace(node, new)


def _before(node: Any, *passed: Any) -> Any:
    """What a value is made of by these operations, where each is read by the next alone and drops nothing; else None."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target not in passed or (node.target is F.dropout and _drops(node)):
            return node
        node = node.args[0]
    return None


def _drops(dropout: Node) -> bool:
    return _given(dropout, 2, "training", True) is not False and _given(dropout, 1, "p", 0.5) != 0


def _operands(node: Any, targets: set[Any]) -> tuple[Any, Any]:
    """The scores, and what is added to them or what they are multiplied by: None where nothing is."""
    if node is None or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return node, None
    one, other = node.args
    return (one, other) if _are_scores(one) else (other, one)


def _are_scores(value: Any) -> bool:
    """Whether it is a product, or made of one by a number or a cast."""
    while isinstance(value, Node) and value.target in MUL | TO_TYPE:
        value = value.all_input_nodes[0]
    return isinstance(value, Node) and value.target in PRODUCTS


def _swapped(node: Any) -> Any:
    """x of ``x.transpose(2, 3)``, else None."""
    if not isinstance(node, Node) or node.target not in ("transpose", torch.transpose) or node.kwargs:
        return None
    return node.args[0] if {axis % 4 for axis in node.args[1:]} == {2, 3} else None  # type: ignore[operator]


def _given(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

"""Write attention that a model computes by itself as PyTorch's, which `attention` knows how to run on kept tokens.

So has transformers with ``attn_implementation="eager"``:

``softmax(q @ k.transpose(2, 3) * s + mask, -1) @ v``  →  ``scaled_dot_product_attention(q, k, v, mask, scale=s)``

Weights that something else reads (``output_attentions=True``) or that are dropped at random have to be computed: they stay.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.passes.edit import dtype_of, insert, insert_traced, is_swap, may_move, replace, sizes
from simba_compile.passes.length import Length, value_of
from simba_compile.passes.match import ADDS
from simba_compile.passes.tokens import MUL, PRODUCTS, TO_TYPE

_DIV: set[Any] = {operator.truediv, torch.div, "div"}
_SOFTMAX: set[Any] = {F.softmax, torch.softmax, "softmax"}


def fuse_attention(graph: Graph, length: Length | None) -> None:
    """Run over a graph, in place.

    Parameters
    ----------
    graph : Graph
        The graph.
    length : Length, optional
        Of a graph that may be pruned: attention among its tokens is fused. Other attention treats tokens alike as it is (to
        an encoder's states, among the heads of a token), or reads them all (pooling). In a graph without tokens to prune,
        such as a decoding step, all attention is fused, since it may read a cache with marks.
    """
    for node in list(graph.nodes):
        if node.target in PRODUCTS and len(node.args) == 2 and len(sizes(node)) == 4:
            _fuse(node, length)


def _fuse(node: Node, length: Length | None) -> None:
    weights, value = node.args
    softmax = _before(weights, {F.dropout} | TO_TYPE)
    if softmax is None or softmax.target not in _SOFTMAX or _given(softmax, 1, "dim") not in (-1, 3):
        return
    scores, mask = _operands(_before(softmax.args[0], TO_TYPE), ADDS)
    scaled = _before(scores, TO_TYPE)
    product, scale = _operands(scaled, MUL | _DIV)
    product = _before(product, TO_TYPE)
    if product is None or product.target not in PRODUCTS or len(product.args) != 2:
        return
    query, across = product.args
    if not isinstance(across, Node) or not is_swap(across, 2, 3):
        return
    key = across.args[0]
    rows = [query, key, value]
    if not all(isinstance(row, Node) for row in rows) or dtype_of(product) != dtype_of(node):
        return  # within autocast what they read may be of other types
    if not _fit(node, query, key, value, mask) or not may_move(product, node, *rows, *([] if mask is None else [mask])):
        return
    if length is not None and not all(length.depends(value_of(row).shape[2]) for row in rows):
        return
    if scale is None:
        scale = 1.0
    elif scaled.target in _DIV and isinstance(scale, float | int) and scale != 0:
        scale = 1 / scale
    elif scaled.target in _DIV or not isinstance(_number(scale), float | int | torch.SymFloat):
        return
    new = insert(node, F.scaled_dot_product_attention, *rows, _of_type(mask, dtype_of(node), node), 0.0, False)
    new.kwargs = {"scale": scale}
    replace(node, new)


def _before(node: Any, passed: set[Any]) -> Any:
    """What a value is made of by these operations, where each is read by the next alone and loses nothing; else None."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target not in passed or _drops(node) or not value_of(node).is_floating_point():
            return node
        node = node.args[0]
    return None


def _drops(node: Node) -> bool:
    """Whether it is a dropout that is not left out."""
    if node.target is not F.dropout:
        return False
    return _given(node, 2, "training", True) is not False and _given(node, 1, "p", 0.5) != 0


def _operands(node: Any, targets: set[Any]) -> tuple[Any, Any]:
    """The scores, and what is added to them or what they are multiplied or divided by; else the node and None."""
    if node is None or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return node, None
    one, other = node.args
    return (one, other) if _are_scores(one) else (other, one)


def _are_scores(value: Any) -> bool:
    """Whether it is a product, or made of one by a number or a cast."""
    while isinstance(value, Node) and value.target in MUL | _DIV | TO_TYPE:
        value = value.all_input_nodes[0]
    return isinstance(value, Node) and value.target in PRODUCTS


def _fit(node: Node, query: Any, key: Any, value: Any, mask: Any) -> bool:
    """Whether they are of attention with as many heads of keys as of queries, and the mask widens nothing."""
    if not all(len(sizes(row)) == 4 for row in (query, key, value)):
        return False
    *heads, queries, _ = sizes(query)
    *_, keys, _ = sizes(key)
    if not heads == sizes(key)[:2] == sizes(value)[:2] == sizes(node)[:2] or keys != sizes(value)[2]:
        return False
    if mask is None:
        return True
    given = value_of(mask)
    is_float = isinstance(given, Tensor) and given.is_floating_point()
    return is_float and sizes(mask)[-2:] in ([queries, keys], [1, keys])


def _of_type(mask: Any, dtype: Any, before: Node) -> Any:
    """A mask in a type, in which its least numbers stay numbers: rows that see nothing would be NaN."""
    if mask is None or dtype_of(mask) == dtype:
        return mask
    if torch.finfo(dtype).max < torch.finfo(value_of(mask).dtype).max:
        mask = insert_traced(before, "clamp", mask, torch.finfo(dtype).min)
    return insert_traced(before, "to", mask, dtype)


def _number(value: Any) -> Any:
    return value_of(value) if isinstance(value, Node) else value


def _given(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

"""Write attention that a model computes by itself as PyTorch's, which `attention` knows how to run on kept tokens.

So has transformers with ``attn_implementation="eager"``:

``softmax(q @ k.transpose(2, 3) * s + mask, -1) @ v``  →  ``scaled_dot_product_attention(q, k, v, mask, scale=s)``

A number far below all scores in place of some is a mask, too (``masked_fill(scores, gone, -inf)``, ``where``). Weights that
something else reads (``output_attentions=True``) are computed beside it: those of all tokens.
"""

import dataclasses
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.passes.attention import may_be_cached, without_pruned
from simba_compile.passes.edit import dtype_of, erase, insert_traced, is_swap, may_move, sizes
from simba_compile.passes.length import Length, value_of
from simba_compile.passes.match import ADDS
from simba_compile.passes.tokens import MUL, PRODUCTS, TO_TYPE

_DIV: set[Any] = {operator.truediv, torch.div, "div"}
_REPLACING: set[Any] = {"masked_fill", torch.masked_fill, torch.where, "where"}
_FAR_BELOW = -1e9  # a weight of 0 beside all others
_SOFTMAX: set[Any] = {F.softmax, torch.softmax, "softmax"}


def fuse_attention(graph: Graph, length: Length | None) -> None:
    """Run over a graph, in place.

    Parameters
    ----------
    graph : Graph
        The graph.
    length : Length, optional
        Of a graph that may be pruned: attention among its tokens is fused. Other attention treats tokens alike as it is (to
        an encoder's states, among the heads of a token), or reads them all (pooling). In another graph, such as a decoding
        step's, attention is fused whose keys may come from a cache with marks.
    """
    for node in list(graph.nodes):
        if node.target in PRODUCTS and len(node.args) == 2 and len(sizes(node)) in (3, 4):
            _fuse(node, length)


def _fuse(node: Node, length: Length | None) -> None:
    weights, value = node.args
    last = len(sizes(node)) - 1
    softmax, dropped = _undropped(weights)
    if softmax is None or softmax.target not in _SOFTMAX or _given(softmax, 1, "dim") not in (-1, last):
        return
    scores, mask = _unmasked(_before(softmax.args[0], TO_TYPE))
    scaled = _before(scores, TO_TYPE)
    product, scale = _operands(scaled, MUL | _DIV)
    product = _before(product, TO_TYPE)
    if product is None or product.target not in PRODUCTS or len(product.args) != 2:
        return
    query, across = product.args
    if not all(isinstance(row, Node) for row in (query, across, value)) or dtype_of(product) != dtype_of(node):
        return  # within autocast what they read may be of other types
    if mask is not None and mask.low not in (None, -math.inf) and dtype_of(node) == torch.float16:
        return  # no number of that type is so low that scores beside it are lost in rounding
    read = [query, across, value, *([] if mask is None else mask.given)]
    if not _fit(node, *read) or not may_move(product, node, *read):
        return
    if not (may_be_cached(across) if length is None else _has_rows(query, across, value, length)):
        return
    if scale is None:
        scale = 1.0
    elif scaled.target in _DIV and isinstance(scale, float | int) and scale != 0:
        scale = 1 / scale
    elif scaled.target in _DIV or not isinstance(_number(scale), float | int | torch.SymFloat):
        return
    key = across.args[0] if is_swap(across, last - 1, last) else insert_traced(node, "transpose", across, last - 1, last)
    added = None if mask is None else _of_type(mask.added(node), dtype_of(node), node)
    node.op, node.target = "call_function", F.scaled_dot_product_attention  # in place: a mixer may be known to add onto it
    node.args, node.kwargs = (query, key, value, added, dropped, False), {"scale": scale}
    erase(weights)  # type: ignore[arg-type]
    if length is None and softmax.users:
        softmax.update_arg(0, insert_traced(softmax, without_pruned, softmax.args[0], key))


@dataclasses.dataclass
class _Mask:
    """What hides keys from queries: numbers that are added to the scores, and truths that say which are then replaced.

    Attributes
    ----------
    masked : Node
        The scores with some hidden.
    bias : Node, optional
        The numbers.
    truths : list of (Node, bool)
        Which scores are replaced, or, where the second is true, which stay.
    low : float, optional
        By what they are replaced.
    """

    masked: Node
    bias: Node | None = None
    truths: list[tuple[Node, bool]] = dataclasses.field(default_factory=list)
    low: float | None = None

    @property
    def given(self) -> list[Node]:
        """What it is made of."""
        return [*([] if self.bias is None else [self.bias]), *(truth for truth, _ in self.truths)]

    def added(self, before: Node) -> Node:
        """The mask as numbers to add, in front of a node."""
        if not self.truths:
            return self.bias  # type: ignore[return-value]
        gone, *more = [insert_traced(before, "logical_not", truth) if seen else truth for truth, seen in self.truths]
        for truth in more:
            gone = insert_traced(before, operator.or_, gone, truth)
        dtype = value_of(self.masked).dtype
        low = self.low if self.low == -math.inf else torch.finfo(dtype).min  # beside it, any score is lost in rounding
        numbers = insert_traced(before, "to", gone if self.bias is None else self.bias, dtype)
        return insert_traced(before, "masked_fill", numbers, gone, low)


def _unmasked(node: Any) -> tuple[Any, _Mask | None]:
    """The scores, and the mask where there is one; no scores where it is no mask that can be added."""
    mask = _Mask(node)
    while node is not None and node.target in _REPLACING and len(node.args) == 3:
        first, second, third = node.args
        if node.target is torch.where:
            is_low = _constant(second) is not None
            scores, truths, low, of_seen = (third, first, second, False) if is_low else (second, first, third, True)
        else:
            scores, truths, low, of_seen = first, second, third, node.target == "where"
        low = _constant(low)
        if low is None or low > _FAR_BELOW or mask.low not in (None, low):
            return None, None
        mask.low = low
        mask.truths.append((truths, of_seen))
        node = _before(scores, TO_TYPE)
    scores, mask.bias = _operands(node, ADDS)
    if mask.bias is not None:
        numbers = value_of(mask.bias)
        if not isinstance(numbers, Tensor) or not numbers.is_floating_point():
            return None, None
    return scores, mask if mask.given else None


def _constant(value: Any) -> float | None:
    """A number, also one that is made a tensor."""
    if isinstance(value, Node) and value.target is torch.tensor:
        value = value.args[0]
    return value if isinstance(value, float | int) else None


def _has_rows(query: Any, across: Any, value: Any, length: Length) -> bool:
    """Whether queries, keys and values have a row for each token, the keys a column, and sequences are told apart."""
    *others, columns = map(value_of, (query, value, across))
    have_rows = all(length.axis(rows) == rows.dim() - 2 for rows in others) and length.axis(columns) == columns.dim() - 1
    return have_rows and all(length.batch_axis(part) == 0 for part in (*others, columns))


def _before(node: Any, passed: set[Any]) -> Any:
    """What a value is made of by these operations, where each is read by the next alone and loses nothing; else None."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target not in passed or _drops(node) or not value_of(node).is_floating_point():
            return node
        node = node.args[0]
    return None


def _undropped(weights: Any) -> tuple[Any, float]:
    """The softmax that weights are made of, and which share of them is dropped at random; None where others read those."""
    dropped = 0.0
    readers = 1
    while isinstance(weights, Node) and weights.target in {F.dropout} | TO_TYPE:
        readers = max(readers, len(weights.users))
        if _drops(weights):
            if dropped or not isinstance(_given(weights, 2, "training", True), bool):
                return None, 0.0
            dropped = _given(weights, 1, "p", 0.5)
        weights = weights.args[0]
    is_alone = isinstance(weights, Node) and max(readers, len(weights.users)) == 1
    return (weights, dropped) if is_alone or not dropped else (None, 0.0)


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


def _fit(node: Node, query: Any, across: Any, value: Any, *masks: Any) -> bool:
    """Whether they are of attention with as many heads of keys as of queries, and the masks widen nothing."""
    if not all(len(sizes(part)) == len(sizes(node)) for part in (query, across, value)):
        return False
    *heads, queries, _ = sizes(query)
    *_, keys = sizes(across)
    if not heads == sizes(across)[:-2] == sizes(value)[:-2] == sizes(node)[:-2] or keys != sizes(value)[-2]:
        return False
    return all(sizes(mask)[-2:] in ([queries, keys], [1, keys]) for mask in masks)


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

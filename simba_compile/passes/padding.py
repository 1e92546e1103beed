"""Whether a sequence of a call ends in padding, read off what the graph takes for an attention mask.

That is an input of the name, and what mixers have their tokens multiplied by: a number for each token, which is an input of
any name or computed from inputs (``ids != pad_token_id``). Where the graph itself puts zeros behind its tokens, every
sequence ends in padding.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from simba_compile.passes.effects import is_inplace, is_random
from simba_compile.passes.length import NO_TOKENS, Length, expression, value_of
from simba_compile.passes.tokens import CASTS, CONCATENATIONS, MUL, PAD, POINTWISE, RESHAPES, VIEWS, ZEROS
from simba_compile.passes.walk import made_of

_SAME_NUMBERS: set[Any] = {*(VIEWS | RESHAPES | CASTS), operator.getitem}
_COMPUTED_TWICE: set[Any] = {  # no other operation is run a second time for the mask's sake
    *(POINTWISE | CONCATENATIONS | _SAME_NUMBERS),
    *(torch.arange, torch.zeros, torch.ones, torch.full, "size", "long", "int", "new_ones", "new_zeros", PAD),
}


def padding_reader(graph: Graph, scans: Iterable[Node], length: Length) -> Callable[[Sequence[Any]], bool]:
    """A function of a call's arguments: whether the mask of some sequence ends in padding.

    Masks on a GPU are not looked at: the host would have to wait for them.

    Parameters
    ----------
    graph : Graph
        The graph of the call.
    scans : iterable of Node
        The mixers' scans. What is multiplied after the last of them is no mixer's.
    length : Length
        Of the graph.
    """
    before = set(made_of(*scans))
    if length.fixed > 0 and any(_pads_the_end(node, length) for node in before):
        return lambda args: True
    masks = [
        node
        for node in graph.find_nodes(op="placeholder")
        if "attention_mask" in node.name and _axis(node, length) == 1 and value_of(node).dim() == 2
    ]
    masks += [factor for node in graph.nodes if node in before for factor in _factors(node, length)]
    cheap: dict[Node, set[Node]] = {}  # and what they are made of
    for mask in dict.fromkeys(masks):
        sources = set(made_of(mask))
        if value_of(mask).device.type == "cpu" and all(_is_cheap(node, length) for node in sources):
            cheap[mask] = sources
    if not cheap:
        return lambda args: False
    needed = set().union(*cheap.values())
    read = [place for place, node in enumerate(graph.find_nodes(op="placeholder")) if node in needed]
    alone = Graph()
    new: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            new[node] = alone.node_copy(node, lambda source: new[source])
    alone.output(tuple(new[mask] for mask in cheap))
    masks_of, axes = GraphModule(graph.owning_module or {}, alone).forward, [_axis(mask, length) for mask in cheap]

    @torch.no_grad()
    def ends_in_padding(args: Sequence[Any]) -> bool:
        found = masks_of(*(args[place] for place in read))
        return any(not mask.select(axis, -1).all() for mask, axis in zip(found, axes, strict=True))

    return ends_in_padding


def _axis(node: Node, length: Length) -> int:
    """The axis of the tokens, with those that the model adds to its inputs' or without; NO_TOKENS where none alone is."""
    value = value_of(node)
    axes = [axis for axis, size in enumerate(value.shape) if length.depends(size)] if isinstance(value, Tensor) else []
    is_alone = len(axes) == 1 and not expression(value.shape[axes[0]]).free_symbols & length.batch.free_symbols
    return axes[0] if is_alone else NO_TOKENS


def _pads_the_end(node: Node, length: Length) -> bool:
    """Whether it puts zeros behind the last of fewer tokens."""
    axis, value = length.of(node), value_of(node)
    if axis < 0 or _is_narrow(value, length):
        return False
    if node.target is PAD:
        source, sizes = node.args[:2]
        behind = 2 * (value.dim() - 1 - axis) + 1  # a size for each end of each axis, and the last axis first
        return length.of(source) < 0 and len(sizes) > behind and bool(sizes[behind])  # type: ignore[arg-type, index]
    parts = node.args[0] if node.target in CONCATENATIONS else None
    return isinstance(parts, list | tuple) and parts[-1].target in ZEROS and length.of(parts[-1]) < 0  # type: ignore[union-attr]


def _factors(node: Node, length: Length) -> list[Node]:
    """What tokens are multiplied by: a number for each, as it was before views and casts."""
    sources = [source for source in node.all_input_nodes if _axis(source, length) != NO_TOKENS]
    if node.target not in MUL or all(_is_narrow(value_of(source), length) for source in sources):
        return []
    return [_without_views(source, length) for source in sources if _is_narrow(value_of(source), length)]


def _without_views(node: Node, length: Length) -> Node:
    tokens = _tokens(node, length)
    while node.target in _SAME_NUMBERS and isinstance(node.args[0], Node):
        source = node.args[0]
        if _tokens(source, length) != tokens or not _is_narrow(value_of(source), length):
            break
        node = source
    return node


def _tokens(node: Node, length: Length) -> sympy.Expr | None:
    """How many tokens a value has, with those that the model adds to its inputs' or without."""
    axis = _axis(node, length)
    return None if axis == NO_TOKENS else expression(value_of(node).shape[axis])


def _is_narrow(value: Any, length: Length) -> bool:
    """Whether it has a number for each token at most, or for each of those that the model adds to its inputs'."""
    if not isinstance(value, Tensor):
        return False
    others = [size for size in value.shape if expression(size) not in (1, length.batch)]
    return len(others) < 2 and all(length.depends(n) or (isinstance(n, int) and n <= length.fixed) for n in others)


def _is_cheap(node: Node, length: Length) -> bool:
    """Whether it may be computed a second time, ahead of the graph: small, plain, and of what nobody writes into."""
    if node.op not in ("placeholder", "get_attr") and (node.target not in _COMPUTED_TWICE or is_random(node)):
        return False
    if any(is_inplace(other) for other in (node, *node.users)):
        return False
    value = value_of(node)  # an argument's length may have a symbol of its own, until it is cut to the tokens
    return node.op == "placeholder" or not isinstance(value, Tensor) or _is_narrow(value, length)

"""A projection's arguments, and what its output is split into: the convolution's input, the gate, the steps."""

from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simba_compile.passes.length import value_of
from simba_compile.passes.tokens import SPLITS


class Piece(NamedTuple):
    """Channels ``first`` to ``last``, the latter not included, of what was split."""

    node: Node
    first: int
    last: int


def linear_arguments(node: Node) -> tuple[Node, Node, Node | None]:
    """x, weight and bias of a linear layer's call."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.args[0], node.args[1], bias  # type: ignore[return-value]


def linear_values(projection: Node) -> list[Any]:
    """What a linear layer takes and gives."""
    return [value_of(node) for node in (*linear_arguments(projection), projection) if node is not None]


def is_plain(projection: Node) -> bool:
    """Whether a linear layer's tensors are plain ones: quantised weights, say, need know nothing but linear layers."""
    return not any(is_traceable_wrapper_subclass(value) for value in linear_values(projection))


def is_of_one_type(projection: Node) -> bool:
    """Whether a linear layer's tensors are plain and of one floating-point type, as they are not under autocast."""
    types = {value.dtype if isinstance(value, torch.Tensor) else None for value in linear_values(projection)}
    return is_plain(projection) and len(types) == 1 and all(kind is not None and kind.is_floating_point for kind in types)


def split_axis(node: Node) -> int | None:
    """The axis that a node splits, counted from the left, where it is a split."""
    if node.target not in SPLITS or not isinstance(value_of(node), list | tuple):
        return None
    axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return axis % value_of(node)[0].dim()  # type: ignore[operator]


def pieces_of(projection: Node) -> list[Piece]:
    """The pieces of a projection, in order, where all that reads it is a split along the channels; else none."""
    split = next(iter(projection.users)) if len(projection.users) == 1 else None
    if split is None or split_axis(split) != value_of(projection).dim() - 1:
        return []
    taken = {user.args[1]: user for user in split.users}  # Dynamo takes every part of a tuple by itself
    parts = value_of(split)
    if len(taken) != len(split.users) or set(taken) != set(range(len(parts))):
        return []
    pieces, first = [], 0
    for place, part in enumerate(parts):
        pieces.append(Piece(taken[place], first, first + int(part.shape[-1])))
        first = pieces[-1].last
    return pieces

"""What a projection's output is split into along its channels: the convolution's input, the gate, the steps."""

from typing import NamedTuple

from torch.fx import Node

from simba_compile.passes.tokens import SPLITS, value_of


class Piece(NamedTuple):
    """Channels ``first`` to ``last``, the latter not included, of what was split."""

    node: Node
    first: int
    last: int


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

"""Decoding steps: fewer calls, each of which costs more than what it computes."""

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from simba_compile.passes.edit import erase, insert, is_stale, replace, sizes
from simba_compile.passes.effects import is_inplace, shares_memory, storage_of
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.pieces import is_of_one_type, linear_arguments
from simba_compile.passes.tokens import LINEAR, SAME_MEMORY, expression, value_of

OPS = torch.ops.simba
EXP: set[Any] = {torch.exp, "exp"}
NEG: set[Any] = {operator.neg, torch.neg, "neg"}
UPDATES = {OPS.state_update: 10, OPS.ssd_state_update: 9}  # how many arguments stand before `log_of_A`


def take_logarithm(node: Node) -> None:
    """A state's update by ``A = -exp(A_log)``, or by a view of it: by A_log, or by that view, of which it makes A itself."""
    if node.target not in UPDATES or len(node.args) != UPDATES[node.target]:  # type: ignore[index]
        return
    A: Node = node.args[3]  # type: ignore[assignment]
    minus = _made(A)
    A_log = _log_of_minus(minus)
    if minus is None or A_log is None or storage_of(A) != storage_of(minus) or is_stale(A, node, A_log):
        return
    if _layout(minus) not in (_layout(A), _layout(A_log)):
        return
    node.args = (*node.args[:3], _viewed(A, minus, A_log), *node.args[4:], True)
    erase(A)


def fuse_step(node: Node) -> None:
    """``conv_update``, x_proj, dt_proj and ``state_update``, where nothing else reads what is between: ``mixer_update``."""
    if node.target is not OPS.state_update or len(node.args) == UPDATES[node.target]:
        return
    state, x, dt, A_log, B, C, D, gate, dt_bias, softplus, _ = node.args
    conv, x_proj, dt_proj, projected = (_made(value) for value in (x, B, dt, gate))
    if conv is None or conv.target is not OPS.conv_update or not _is_product(x_proj) or not _is_product(dt_proj):
        return
    window, entering, conv_weight, conv_bias, silu = conv.args
    if not silu or not softplus or projected is None:
        return
    channels, states = sizes(state)[1:]
    rank = sizes(dt_proj.args[1])[1]  # type: ignore[union-attr]
    pieces = (
        (entering, projected, 0, channels),
        (gate, projected, channels, channels),
        (x, conv, 0, channels),
        (x_proj.args[0], conv, 0, channels),  # type: ignore[union-attr]
        (dt_proj.args[0], x_proj, 0, rank),  # type: ignore[union-attr]
        (B, x_proj, rank, states),
        (C, x_proj, rank + states, states),
        (dt, dt_proj, 0, channels),
    )
    if not all(_is_piece(*piece) for piece in pieces):
        return
    inside = {conv, x_proj, dt_proj, node}
    if any(reader not in inside for made in (conv, x_proj, dt_proj) for reader in _readers(made)):  # type: ignore[arg-type]
        return
    end = _end(node, [*sizes(projected)[:-1], channels])
    if end is None or _is_disturbed(conv, node, window):  # type: ignore[arg-type]
        return
    weights = (conv_weight, conv_bias, x_proj.args[1], dt_proj.args[1], dt_bias)  # type: ignore[union-attr]
    replace(end, insert(node, OPS.mixer_update, state, window, projected, *weights, A_log, D))
    for updated in (node, conv):  # they write, so they are not dropped for having no reader
        sources = updated.all_input_nodes
        updated.graph.erase_node(updated)
        for source in sources:
            erase(source)


def _made(value: Any) -> Node | None:
    """The node whose result a value is a view of."""
    while isinstance(value, Node) and value.target in SAME_MEMORY and isinstance(value.args[0], Node):
        value = value.args[0]
    return value if isinstance(value, Node) else None


def _readers(node: Node) -> Iterator[Node]:
    """What reads a node's result, through views of it or not."""
    for user in node.users:
        if user.target in SAME_MEMORY:
            yield from _readers(user)
        else:
            yield user


def _is_product(node: Node | None) -> bool:
    """Whether it is a linear layer that adds nothing: `simba::linear` on the CPU, torch's elsewhere."""
    if node is None:
        return False
    if node.target is OPS.linear:
        return not any(node.args[2:])
    return node.target in LINEAR and linear_arguments(node)[2] is None and is_of_one_type(node)


def _viewed(view: Node, whole: Node, other: Node) -> Node:
    """What a view of one value is of another that lies as it does; itself, where the view is all there is."""
    if _layout(view) == _layout(whole):
        return other
    source = _viewed(view.args[0], whole, other)  # type: ignore[arg-type]
    with view.graph.inserting_after(view):
        return view.graph.node_copy(view, lambda read: source if read is view.args[0] else read)


def _layout(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    return sizes(node), [expression(step) for step in value.stride()], expression(value.storage_offset())


def _log_of_minus(A: Any) -> Node | None:
    """A_log where A is ``-exp(A_log)``."""
    exp = A.args[0] if isinstance(A, Node) and A.target in NEG and not A.kwargs else None
    if not isinstance(exp, Node) or exp.target not in EXP or exp.kwargs or not isinstance(exp.args[0], Node):
        return None
    return exp.args[0]


def _row_stride(value: Tensor) -> tuple[sympy.Expr, sympy.Expr] | None:
    """How many rows a value has and how far they are apart (0 for one row), where its last axis is dense in them."""
    sized = [(expression(n), expression(step)) for n, step in zip(value.shape, value.stride(), strict=True)]
    rows = [row for row in sized[:-1] if row[0] != 1]
    if sized[-1][1] != 1 or len(rows) > 1:
        return None
    return rows[0] if rows else (sympy.Integer(1), sympy.Integer(0))


def _is_piece(node: Any, source: Node, first: sympy.Expr, count: sympy.Expr) -> bool:
    """Whether a value is the channels first..first+count of another, which is dense, row by row."""
    value, whole = value_of(node), value_of(source)
    if not isinstance(value, Tensor) or not isinstance(whole, Tensor) or storage_of(node) != storage_of(source):
        return False
    rows = _row_stride(whole)
    dense = rows is not None and rows[1] in (0, sizes(source)[-1])
    starts = expression(value.storage_offset()) == expression(whole.storage_offset()) + first
    return dense and starts and sizes(node)[-1] == count and _row_stride(value) == rows


def _end(node: Node, shape: list[sympy.Expr]) -> Node | None:
    """A node, or the view after it, each the only reader, that has this shape and all of it in order."""
    end = node
    while sizes(end) != shape or not _is_piece(end, node, sympy.Integer(0), shape[-1]):
        reader = next(iter(end.users), None)
        if reader is None or len(end.users) != 1 or reader.target not in SAME_MEMORY:
            return None
        end = reader
    return end


def _is_disturbed(first: Node, last: Node, window: Node) -> bool:
    """Whether anything between two nodes writes, changes autocast, or reads the window, which the first one writes."""
    if mode_changes(first, last):
        return True
    while first.next is not last:
        first = first.next
        if is_inplace(first) or any(shares_memory(source, window) for source in first.all_input_nodes):
            return True
    return False

"""Decoding steps: fewer calls, each of which costs more than what it computes."""

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from simba_compile.passes.edit import erase, insert, is_stale, may_move, replace, sizes
from simba_compile.passes.effects import is_inplace, shares_memory, storage_of
from simba_compile.passes.length import expression, value_of
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.pieces import is_of_one_type, linear_arguments
from simba_compile.passes.tokens import LINEAR, SAME_MEMORY

OPS = torch.ops.simba
EXP: set[Any] = {torch.exp, "exp"}
NEG: set[Any] = {operator.neg, torch.neg, "neg"}
UPDATES = {OPS.state_update: 10, OPS.ssd_state_update: 9}  # how many arguments stand before `log_of_A`


def fix_sizes(node: Node) -> None:
    """The sizes of a cached state, behind its batch, are the model's.

    Those that Dynamo has as symbols, since the states of a model before were of other sizes, are fixed by guards.
    """
    if node.target in (OPS.conv_update, *UPDATES):
        for size in value_of(node.args[0]).shape[1:]:
            int(size)


def take_logarithm(node: Node) -> None:
    """A state's update by ``A = -exp(A_log)``, or by a view of it: by A_log, or by that view, of which it makes A itself."""
    if node.target not in UPDATES or len(node.args) != UPDATES[node.target]:  # type: ignore[index]
        return
    A: Node = node.args[3]  # type: ignore[assignment]
    minus = _made(A)
    A_log = log_of_minus(minus)
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
    if sizes(projected)[-1] != 2 * channels or sizes(x_proj)[-1] != rank + 2 * states:
        return
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
    _drop(node, conv)


def fuse_ssd_step(node: Node) -> None:
    """``conv_update``, ``ssd_state_update`` and, if there is one, ``gated_norm``: ``ssd_mixer_update``."""
    if node.target is not OPS.ssd_state_update or len(node.args) == UPDATES[node.target]:
        return
    state, x, dt, A_log, B, C, D, dt_bias, softplus, _ = node.args
    conv, projected = _made(x), _made(dt)
    if conv is None or conv.target is not OPS.conv_update or projected is None:
        return
    window, entering, conv_weight, conv_bias, silu = conv.args
    heads, size, _ = sizes(state)[1:]
    inner, mixed = heads * size, sizes(conv)[-1]
    grouped = (mixed - inner) / 2
    pieces = (
        (entering, projected, inner, mixed),
        (dt, projected, inner + mixed, heads),
        (x, conv, 0, inner),
        (B, conv, inner, grouped),
        (C, conv, inner + grouped, grouped),
    )
    whole = sizes(projected)[-1] == inner + mixed + heads
    if not silu or not softplus or not whole or not all(_is_piece(*piece) for piece in pieces):
        return
    if any(reader is not node for reader in _readers(conv)) or _is_disturbed(conv, node, window):  # type: ignore[arg-type]
        return
    weights = (conv_weight, conv_bias, _unviewed(dt_bias), A_log, _unviewed(D))
    end = _end(node, [*sizes(projected)[:-1], inner])
    norm = _norm_after(end, node, projected, inner)
    normed = (None, 0.0, 0) if norm is None else norm.args[2:]
    update = insert(node, OPS.ssd_mixer_update, state, window, projected, *weights, *normed)
    if end is None:  # it is read as heads
        rows = insert(node, "unflatten", update, -1, (int(heads), int(size)))
        replace(node, insert(node, "flatten", rows, 0, -3))
    else:
        replace(norm or end, update)
    _drop(node, conv)


def _norm_after(value: Node | None, update: Node, projected: Node, channels: sympy.Expr) -> Node | None:
    """The gated norm that alone reads a value, where the update may run it: by the gate before the convolution's input."""
    norm = next(iter(value.users), None) if value is not None and len(value.users) == 1 else None
    if norm is None or norm.target is not OPS.gated_norm or len(norm.args) != 5:
        return None
    x, gate, weight, *_ = norm.args
    if x is not value or not _is_piece(gate, projected, sympy.Integer(0), channels):
        return None
    weights = [weight] if isinstance(weight, Node) else []
    there = all(given.op in ("placeholder", "get_attr") for given in weights)  # when the update runs
    return norm if there and may_move(update, norm, projected, *weights) else None


def _drop(*updates: Node) -> None:
    """Erase nodes that write, which are not dropped for having no reader."""
    for update in updates:
        sources = update.all_input_nodes
        update.graph.erase_node(update)
        erase(*sources)


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
    """The view `view` of `whole`, taken of `other` instead, which lies in memory as `whole` does: all of it, or a part."""
    if _layout(view) == _layout(whole):
        return other
    source = _viewed(view.args[0], whole, other)  # type: ignore[arg-type]
    with view.graph.inserting_after(view):
        return view.graph.node_copy(view, lambda read: source if read is view.args[0] else read)


def _unviewed(value: Any) -> Any:
    """The value that this is a view of, where the view is all of it; else the value itself."""
    made = _made(value)
    return made if made is not None and storage_of(made) == storage_of(value) and _layout(made) == _layout(value) else value


def _layout(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    return sizes(node), [expression(step) for step in value.stride()], expression(value.storage_offset())


def log_of_minus(A: Any) -> Node | None:
    """A_log where A is ``-exp(A_log)``."""
    exp = A.args[0] if isinstance(A, Node) and A.target in NEG and not A.kwargs else None
    if not isinstance(exp, Node) or exp.target not in EXP or exp.kwargs or not isinstance(exp.args[0], Node):
        return None
    return exp.args[0]


def _rows(value: Tensor, channels: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """How many rows of so many channels a value has, and how far they are apart (0 for one row), where channels are dense.

    They may be several axes, such as heads and the channels of each.
    """
    axes = [(expression(n), expression(step)) for n, step in zip(value.shape, value.stride(), strict=True)]
    dense = sympy.Integer(1)
    while axes and dense != channels:
        n, step = axes.pop()
        if n != 1 and step != dense:
            return None
        dense *= n
    rows = [row for row in axes if row[0] != 1]
    if dense != channels or len(rows) > 1:
        return None
    return rows[0] if rows else (sympy.Integer(1), sympy.Integer(0))


def _is_piece(node: Any, source: Node, first: sympy.Expr, count: sympy.Expr, channels: sympy.Expr | None = None) -> bool:
    """Whether a value is the channels first..first+count of another, which is dense, row by row.

    The other's channels are its last axis, or as many as are given.
    """
    value, whole = value_of(node), value_of(source)
    if not isinstance(value, Tensor) or not isinstance(whole, Tensor) or storage_of(node) != storage_of(source):
        return False
    width = channels or sizes(source)[-1]
    rows = _rows(whole, width)
    dense = rows is not None and rows[1] in (0, width)
    starts = expression(value.storage_offset()) == expression(whole.storage_offset()) + first
    return dense and starts and _rows(value, count) == rows


def _end(node: Node, shape: list[sympy.Expr]) -> Node | None:
    """A node, or the view after it, each the only reader, that has this shape and all of it in order."""
    end = node
    while sizes(end) != shape or not _is_piece(end, node, sympy.Integer(0), shape[-1], shape[-1]):
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

"""Write in-place operations on values of their own as ordinary ones, so that the other passes may copy and reorder them.

``m = zeros_like(x); m.scatter_(1, i, 1); y = ~m`` becomes ``m = zeros_like(x); n = m.scatter(1, i, 1); y = ~n``. Only where
nobody can see the difference: the value that is written to was made by an operation (it is not a view of another value, and
no input), and nothing made before the write is a view of it. The modes of autograd and autocast have to be those that the
value was made in: without gradients a write leaves the value its history, and an ordinary operation would have none. And
products stay, for autocast changes the type of an ordinary one.

Then what depends on where numbers lie in memory is made to do the same wherever they lie, for other passes move them:
``contiguous`` and ``reshape`` copy only what is not in order, and ``view`` fails on it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.passes.edit import called
from simba_compile.passes.effects import IN_PLACE, given, is_inplace, place_of, shares_memory, storage_of, written
from simba_compile.passes.length import value_of
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.tokens import RESHAPES

_BY_LAYOUT: set[Any] = RESHAPES | {"contiguous", "ravel", torch.ravel}
_PRODUCTS = {"addmm_", "addmv_", "addr_", "addbmm_", "baddbmm_"}
_GIVE_THEIR_INPUT: set[Any] = {F.dropout, torch.dropout}  # in evaluation, where Dynamo shows a copy


def make_functional(graph: Graph) -> None:
    """Run over a graph, in place."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    made: set[Node] = set()  # results of writes that are ordinary operations now: no views of what was written to
    for node in graph.nodes:
        plain = _plain(node)
        if plain is None or not node.args or not isinstance(node.args[0], Node) or not _keeps_dtype(node, *plain):
            continue
        value = node.args[0]
        before = [user for user in value.users if place[user] < place[node]]
        own = value.op in ("call_function", "call_method") and value.target not in _GIVE_THEIR_INPUT
        near = before if value in made else [*value.all_input_nodes, *before]
        if not own or any(shares_memory(value, other) or other.target in _GIVE_THEIR_INPUT for other in near):
            continue
        if mode_changes(value, node):
            continue
        node.target, node.args, node.kwargs = plain
        made.add(node)
        for user in [user for user in value.users if place[user] > place[node]]:
            user.replace_input_with(value, node)


def allow_any_layout(graph: Graph) -> None:
    """Have a copy be one in any layout, where it or its source is written to later, and a view be a copy if need be."""
    later: set[int | None] = set()  # the memory that is written to
    for node in reversed(graph.nodes):
        if is_inplace(node):
            later |= {storage_of(value) for value in written(node)}
        source = node.args[0] if node.args else None
        if node.target not in _BY_LAYOUT or not isinstance(source, Node):
            continue
        is_written = bool(later & {storage_of(node), storage_of(source), None})
        if is_written and not shares_memory(node, source):
            with graph.inserting_after(node):
                copy = graph.call_method("clone", (node,))
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]
            copy.meta = dict(node.meta)
        elif not is_written and node.target == "view" and not node.kwargs and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"


def _keeps_dtype(node: Node, target: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the ordinary operation gives the type of the value that was written to: a comparison does not."""
    values = [value for value in map(value_of, node.all_input_nodes) if isinstance(value, Tensor)]
    if not all(torch.promote_types(values[0].dtype, value.dtype) == values[0].dtype for value in values):
        return False
    if any(value_of(source) is None for source in node.all_input_nodes):
        return False
    result = called(target, args, kwargs)
    return not isinstance(result, Tensor) or result.dtype == values[0].dtype


def _plain(node: Node) -> tuple[Any, tuple, dict[str, Any]] | None:
    """What computes the same without writing, where the node writes in place: target and arguments."""
    if node.op == "call_function":
        if node.target in IN_PLACE:
            return IN_PLACE[node.target], node.args, node.kwargs
        return _not_inplace(node) if given(node, "inplace") is True else None
    name = node.target if node.op == "call_method" else None
    if isinstance(name, str) and name.endswith("_") and not name.endswith("__") and name not in {"copy_", *_PRODUCTS}:
        is_method = callable(getattr(Tensor, name[:-1], None))  # requires_grad is none
        return (name[:-1], node.args, node.kwargs) if is_method else None
    return None


def _not_inplace(node: Node) -> tuple[Any, tuple, dict[str, Any]]:
    """``relu(x, inplace=True)``: without it."""
    place = place_of(node.target, "inplace")
    kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    return node.target, tuple(value for i, value in enumerate(node.args) if i != place), kwargs

"""Small edits of a graph, and what nodes hold, for the passes that rewrite."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

from simba_compile.passes.effects import is_inplace, written_between
from simba_compile.passes.length import expression, value_of
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.walk import reached


def sizes(node: Any) -> list[sympy.Expr]:
    """The shape of a tensor's node as expressions; empty for anything else."""
    value = value_of(node)
    return [expression(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def is_swap(node: Node, first: int = 1, second: int = 2) -> bool:
    """Whether it is ``x.transpose(first, second)``."""
    rank = len(sizes(node))
    axes = {axis % rank for axis in node.args[1:]} if node.target in ("transpose", torch.transpose) else set()  # type: ignore
    return axes == {first, second} and not node.kwargs


def insert(before: Node, target: Callable | str, *args: Any) -> Node:
    """A call in front of a node: of a function, or of the method of that name."""
    with before.graph.inserting_before(before):
        if isinstance(target, str):
            return before.graph.call_method(target, args)
        return before.graph.call_function(target, args)


def insert_traced(before: Node, target: Callable | str, *args: Any) -> Node:
    """A call in front of a node, with what it computes as Dynamo would show it: passes that follow read that."""
    new = insert(before, target, *args)
    new.meta = {**before.meta, "example_value": called(target, args)}
    return new


def called(target: Callable | str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """What Dynamo would show of a call of nodes."""
    args, kwargs = torch.fx.map_arg((args, kwargs or {}), value_of)  # type: ignore[assignment, misc]
    # As Dynamo does: else torch 2.11 has no products of symbolic sizes. And without gradients, as what it is called with may
    # have been made: writing into a view that was would fail.
    with enable_python_dispatcher(), torch.no_grad():
        return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def replace(node: Node, new: Node) -> None:
    """Put `new` in a node's place, and drop what nothing else reads."""
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    erase(node)


def erase(*nodes: Node) -> None:
    """Drop nodes that nothing reads, and what only they read; an input stays, and what writes in place."""
    unread, gone = list(nodes), set()
    while unread:
        node = unread.pop()
        if node not in gone and not node.users and node.op != "placeholder" and not is_inplace(node):
            unread += node.all_input_nodes
            node.graph.erase_node(node)
            gone.add(node)


def may_move(first: Node, last: Node, *sources: Node) -> bool:
    """Whether the last of two nodes may compute from these sources what the first one computes from them."""
    return not mode_changes(first, last) and not written_between(first, last, *sources)


def rank_of(node: object) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def dtype_of(node: object) -> torch.dtype | None:
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_stale(value: Node, node: Node, *sources: Node) -> bool:
    """Whether sources of a value, the value or one on the way to it is written in place before a node, or modes change.

    The node then cannot compute from the sources what it computes from the value.
    """

    def tensors(step: Node) -> list[Node]:
        return [] if step in sources else [source for source in step.all_input_nodes if rank_of(source) >= 0]

    way = reached([value], tensors)
    return any(written_between(step, node, step) or (step not in sources and mode_changes(step, node)) for step in way)

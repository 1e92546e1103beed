"""What nodes do beside computing a value: write in place, draw random numbers, run graphs inside this one."""

import functools
import inspect
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from simba_compile.passes.length import value_of

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor")
IN_PLACE: dict[Any, Any] = {  # operators that write, and those that compute the same without
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name) for name in _OPERATORS
}
_WRITING_METHODS = {"__setitem__", *(f"__{written.__name__}__" for written in IN_PLACE)}


def subgraphs(node: Node) -> list[GraphModule]:
    """The graphs that a higher-order operator runs: those among its arguments."""
    owner = node.graph.owning_module
    names = [source.target for source in node.all_input_nodes if source.op == "get_attr"]
    found = [getattr(owner, name, None) for name in names if isinstance(name, str)]
    return [value for value in found if isinstance(value, GraphModule)]


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers: dropout, where it is on."""
    return node.target is torch.nn.functional.dropout and given(node, "training") is not False and given(node, "p") != 0


def given(node: Node, name: str) -> Any:
    """What a function written in Python is given for a parameter, by name or by place; None where it is not given."""
    place = place_of(node.target, name)
    return node.args[place] if place is not None and place < len(node.args) else node.kwargs.get(name)


@functools.cache
def place_of(target: Any, name: str) -> int | None:
    """Where a parameter of that name stands among those of a function written in Python."""
    names = list(inspect.signature(target).parameters) if inspect.isfunction(target) else []
    return names.index(name) if name in names else None


def is_inplace(node: Node) -> bool:
    """Whether the node writes into one of its inputs."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if any(is_inplace(inner) for graph in subgraphs(node) for inner in graph.graph.nodes):
        return True
    if node.kwargs.get("out") is not None or given(node, "inplace") is True:
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else target.__name__
    if name == "setitem" or target in IN_PLACE or name in _WRITING_METHODS:
        return True
    is_operator = getattr(target, "__module__", None) == operator.add.__module__  # `operator.and_` computes
    return name.endswith("_") and not name.endswith("__") and not is_operator


def written(node: Node) -> list[Node]:
    """What a node that `is_inplace` may write into.

    What an operator's schema names; else the first argument and ``out``, or, where that is no value, anything that is read.
    """
    if isinstance(node.target, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return [value for value in tree_leaves(_written_by_schema(node)) if isinstance(value, Node)]
    if not node.args or not isinstance(node.args[0], Node) or subgraphs(node):
        return node.all_input_nodes  # by name, of a list of values, by a graph inside
    out = node.kwargs.get("out")
    values = [node.args[0], *(out if isinstance(out, list | tuple) else [out])]
    return [value for value in values if isinstance(value, Node)]


def _written_by_schema(node: Node) -> list[Any]:
    """The arguments that an operator says it writes to; of a packet, those that any of its overloads does."""
    target: Any = node.target
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else [getattr(target, n) for n in target.overloads()]
    found = []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                by_place = place < len(node.args) and not argument.kwarg_only
                found.append(node.args[place] if by_place else node.kwargs.get(argument.name))
    return found


def storage_of(node: Node) -> int | None:
    """Which memory a value is in: views of one another have the same."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def shares_memory(one: Node, other: Node) -> bool:
    """Whether one of the values is a view of the other, or both are views of the same; of several results, any."""
    places = [
        {value.untyped_storage()._cdata for value in tree_leaves(value_of(node)) if isinstance(value, Tensor)}
        for node in (one, other)
    ]
    return not places[0].isdisjoint(places[1])


def written_between(first: Node, last: Node, *values: Node) -> bool:
    """Whether one of the values is written in place between two nodes: it may not be what it was."""
    places = {storage_of(value) for value in values}
    while first is not last and first.op != "root":
        first = first.next
        if is_inplace(first) and (None in places or places & {storage_of(value) for value in written(first)}):
            return True
    return False

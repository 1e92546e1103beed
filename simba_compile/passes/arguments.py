"""Put calls under the names that the other passes know, and their arguments in their places, under torch's own names.

``torch.Tensor.split(x, 2)``           →  ``x.split(2)``
``x.__invert__()``                     →  ``~x``
``torch.hstack([x, y])``               →  ``torch.cat([x, y], dim=1)``
``x.swapaxes(1, 2)``, ``x.mT``         →  ``x.transpose(1, 2)``
``einsum("bid,bjd->bij", x, y)``       →  ``x @ y.transpose(-2, -1)``
``x.bmm(y)``, ``x.mm(y)``              →  ``x.matmul(y)``
``addmm(bias, x, weight)``             →  ``linear(x, weight.t(), bias)``
``x.expand_as(y)``                     →  ``x.expand(batch, tokens, 16)``
``torch.cat(tensors=[x, y], axis=1)``  →  ``torch.cat([x, y], dim=1)``
``x.permute(dims=(0, 2, 1))``          →  ``x.permute((0, 2, 1))``

Dynamo keeps a call as the model wrote it, but under a mode of torch functions, as `torch.set_default_device` sets one, where
it shows what the mode sees. Torch takes NumPy's names of some arguments beside its own.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from simba_compile.passes.edit import insert_traced, sizes
from simba_compile.passes.length import expression, value_of
from simba_compile.passes.scans import MIXER_OPERATORS
from simba_compile.passes.tokens import (
    ALONG_AXES,
    CASTS,
    CONCATENATIONS,
    LINEAR,
    NORMS,
    POINTWISE,
    PRODUCTS,
    REORDERS,
    RESHAPES,
    VIEWS,
)

# The axis along which they join, where all have it; where one has not, they make it first.
_STACKS: dict[Any, int] = {torch.vstack: 0, torch.row_stack: 0, torch.hstack: 1, torch.column_stack: 1, torch.dstack: 2}
_SYNONYMS = {  # functions and methods
    **{"swapaxes": "transpose", "swapdims": "transpose", "multiply": "mul", "divide": "div", "true_divide": "div"},
    **{"subtract": "sub", "negative": "neg", "absolute": "abs"},
}
_SYNONYMS |= {f"{name}_": f"{known}_" for name, known in _SYNONYMS.items()}  # that write in place
_PRODUCTS: dict[Any, Any] = {torch.mm: torch.matmul, torch.bmm: torch.matmul, "mm": "matmul", "bmm": "matmul"}
_OF_TWO = {torch.max: torch.maximum, torch.min: torch.minimum, "max": torch.maximum, "min": torch.minimum}
_AS_ANOTHER = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape"}  # the shape of another value
_OF_NUMPY = {
    **{"axis": "dim", "axis0": "dim0", "axis1": "dim1", "keepdims": "keepdim"},
    **{"x": "input", "a": "input", "x1": "input", "x2": "other"},
}
_FIRST = {"input", "tensor", "tensors"}
_NEXT = {  # what follows the first argument, as far as some pass reads it by its place
    **dict.fromkeys(LINEAR, ("weight", "bias")),
    F.embedding: ("weight",),
    **dict.fromkeys(NORMS, ("normalized_shape",)),
    **dict.fromkeys(CONCATENATIONS | {"mean", torch.mean}, ("dim",)),
    **dict.fromkeys(PRODUCTS | {"add", torch.add, "sub", torch.sub, "mul", torch.mul, "div", torch.div}, ("other",)),
    **dict.fromkeys(("pow", torch.pow), ("exponent",)),
    **dict.fromkeys(("narrow", torch.narrow), ("dim", "start", "length")),
    **dict.fromkeys(("permute", torch.permute, "flip", torch.flip), ("dims",)),
    **dict.fromkeys(("roll", torch.roll), ("shifts", "dims")),
    **dict.fromkeys(("transpose", torch.transpose), ("dim0", "dim1")),
    **{"view": ("size",), "reshape": ("shape",), torch.reshape: ("shape",)},
}
_KNOWN = POINTWISE | ALONG_AXES.keys() | RESHAPES | VIEWS | CASTS | REORDERS | _NEXT.keys()
_KNOWN -= {torch.where}  # whose first is no input


def name_calls(graph: Graph) -> None:
    """Run over a graph, in place. An input that is named as a method gets another name: it is no call of that method."""
    for node in graph.nodes:
        if node.op == "placeholder" and hasattr(torch.Tensor, node.target):
            node.target = f"{node.target}_input"  # in a graph inside, Dynamo names inputs after what makes them
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and node.args and getattr(torch.Tensor, name, None) is node.target:
            node.op, node.target = "call_method", name
        if node.op == "call_method" and node.target.startswith("__") and hasattr(operator, node.target) and not node.kwargs:
            node.op, node.target = "call_function", getattr(operator, node.target)
        if name in _SYNONYMS and node.target is getattr(torch, name, None):
            node.target = getattr(torch, _SYNONYMS[name])
        if node.op == "call_method" and node.target in _SYNONYMS:
            node.target = _SYNONYMS[node.target]
        if (node.target is getattr and node.args[1] == "mT") or node.target is torch.ops.aten.mT:  # the second since 2.15
            node.op, node.target, node.args = "call_method", "transpose", (node.args[0], -2, -1)
        if node.target is getattr and node.args[1] in ("real", "imag"):
            node.target, node.args = getattr(torch, node.args[1]), node.args[:1]  # type: ignore[arg-type]
        if node.target in _OF_TWO and len(node.args) == 2 and isinstance(value_of(node.args[1]), torch.Tensor):
            node.op, node.target = "call_function", _OF_TWO[node.target]
        if node.target in _PRODUCTS and not node.kwargs:
            node.target = _PRODUCTS[node.target]
        if node.target in (torch.addmm, "addmm") and not node.kwargs and len(sizes(node.args[0])) == 1:
            bias, rows, weight = node.args
            node.op, node.target = "call_function", F.linear
            node.args = (rows, insert_traced(node, "t", weight), bias)
        if node.op == "call_method" and node.target in _AS_ANOTHER and len(node.args) == 2:
            node.target, node.args = _AS_ANOTHER[node.target], (node.args[0], *_shape_of(node.args[1], node))
        if node.target in (torch.broadcast_to, "broadcast_to") and len(node.args) == 2:
            node.op, node.target = "call_method", "expand"
        if node.target is torch.einsum:
            _name_product(node)
        dim = _STACKS.get(node.target)
        if dim is not None and all(value_of(part).dim() > max(dim, 1) for part in node.all_input_nodes):
            node.target, node.kwargs = torch.cat, {**node.kwargs, "dim": dim}


def _shape_of(value: Any, before: Node) -> list[Any]:
    """A value's sizes: numbers, inputs of the graph, or what is read off the value in front of a node."""
    inputs = before.graph.find_nodes(op="placeholder")
    given = {expression(value_of(node)): node for node in inputs if isinstance(value_of(node), torch.SymInt)}
    return [
        size if isinstance(size, int) else given.get(expression(size)) or insert_traced(before, "size", value, axis)
        for axis, size in enumerate(value_of(value).shape)
    ]


def _name_product(node: Node) -> None:
    """Write an einsum as a product of matrices, where it is one: of all that stand in the two, or of rows with a matrix."""
    equation, *factors = node.args
    if not isinstance(equation, str) or len(factors) != 2:
        return
    one, _, rest = equation.replace(" ", "").partition(",")
    other, _, out = rest.partition("->")
    summed = set(one) & set(other) - set(out)
    repeats = any(len(set(term)) < len(term) for term in (one, other, out))
    if not (one + other + out).isalpha() or repeats or len(summed) != 1:
        return
    x, y = factors
    (j,) = summed
    batch = [letter for letter in one if letter in other and letter != j]
    rows, columns = ([letter for letter in term if letter not in (*batch, j)] for term in (one, other))
    if len(columns) != 1 or not rows or (batch and len(rows) > 1) or set(out) != {*batch, *rows, *columns}:
        return
    if sizes(x)[one.index(j)] != sizes(y)[other.index(j)]:  # one is a single one, which einsum repeats
        return
    x = _with_axes(node, x, one, [*batch, *rows, j])
    y = _with_axes(node, y, other, [*batch, j, *columns])
    made = [*batch, *rows, *columns]
    if made == list(out):
        node.target, node.args = torch.matmul, (x, y)
    else:
        node.op, node.target = "call_method", "permute"
        node.args = (insert_traced(node, torch.matmul, x, y), [made.index(letter) for letter in out])


def _with_axes(before: Node, value: Any, letters: str, order: list[str]) -> Any:
    """A value with its axes in another order."""
    places = [letters.index(letter) for letter in order]
    last = len(places) - 1
    if places == list(range(last + 1)):
        return value
    if places == [*range(last - 1), last, last - 1]:
        return insert_traced(before, "transpose", value, -2, -1)
    return insert_traced(before, "permute", value, places)


def place_arguments(graph: Graph) -> None:
    """Run over a graph, in place."""
    for node in graph.nodes:
        if node.kwargs and node.op in ("call_function", "call_method"):
            _place(node)


def _place(node: Node) -> None:
    named = dict(node.kwargs)
    if node.target in MIXER_OPERATORS:
        order = [{argument.name} for argument in node.target.default._schema.arguments]  # type: ignore[union-attr]
    elif node.target in _KNOWN:
        named = {_OF_NUMPY.get(name, name): value for name, value in named.items()}
        order = [_FIRST, *({name} for name in _NEXT.get(node.target, ()))]
    else:
        return
    args = list(node.args)
    for names in order[len(args) :]:
        found = names & named.keys()
        if not found:
            break
        args.append(named.pop(found.pop()))
    node.args, node.kwargs = tuple(args), named

"""Where a value of the graph has its tokens: the axis whose symbolic size is the sequence length.

Also what may run on fewer tokens than it was traced with. An operation may if it treats tokens alike and apart. Symbolic
sizes show most that do not (the axis is gone, or its size is another); what they cannot show is decided by short lists of
operations. What is not known to be safe is not.
"""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

NO_TOKENS = -1  # the value has no token axis
UNCLEAR = -2  # it depends on the length in another way: flattened, shifted, or along two axes


def value_of(node: Any) -> Any:
    """What Dynamo saw at a node: a fake tensor, a SymInt, a tuple of them. None for what is no node."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Length:
    """The sequence length of a graph, as a symbol, and the axes that have it.

    Parameters
    ----------
    example : Tensor
        Any value of shape (batch, token, ...).
    """

    def __init__(self, example: Tensor) -> None:
        self.symbol = expression(example.shape[1])
        self.batch = expression(example.shape[0])

    @property
    def is_symbolic(self) -> bool:
        """Whether the length can vary, and is not tied to the batch size."""
        return isinstance(self.symbol, sympy.Symbol) and self.symbol not in self.batch.free_symbols

    def axis(self, value: Any) -> int:
        """The token axis of a tensor, or of the tensors of a tuple that have one; NO_TOKENS or UNCLEAR."""
        if isinstance(value, list | tuple):
            axes = {self.axis(item) for item in value} - {NO_TOKENS}
            return axes.pop() if len(axes) == 1 else UNCLEAR if axes else NO_TOKENS
        if isinstance(value, torch.SymInt):
            return UNCLEAR if self.symbol in expression(value).free_symbols else NO_TOKENS
        if not isinstance(value, Tensor):
            return NO_TOKENS
        sizes = [expression(size) for size in value.shape]
        depends = [i for i, size in enumerate(sizes) if self.symbol in size.free_symbols]
        if not depends:
            return NO_TOKENS
        return depends[0] if len(depends) == 1 and sizes[depends[0]] == self.symbol else UNCLEAR

    def of(self, node: Any) -> int:
        """The token axis of a node's value."""
        return self.axis(value_of(node))

    def is_number(self, node: Node) -> bool:
        """Whether the node is an integer that depends on the length, or a tuple of integers such as a shape."""
        value = value_of(node)
        items = value if isinstance(value, list | tuple) else [value]
        depends = [isinstance(item, torch.SymInt) and self.symbol in expression(item).free_symbols for item in items]
        return any(depends) and all(isinstance(item, int | torch.SymInt) for item in items)

    def find(self, inputs: Iterable[Node]) -> tuple[int, int | None]:
        """Where a call's arguments show the length: (argument, axis), or (argument, None) where it is one itself."""
        for place, node in enumerate(inputs):
            value = value_of(node)
            if isinstance(value, torch.SymInt) and expression(value) == self.symbol:
                return place, None
            if isinstance(value, Tensor) and self.axis(value) >= 0:
                return place, self.axis(value)
        raise ValueError(f"no input of the graph has the length {self.symbol}")

    def has_batch(self, value: Any) -> bool:
        """Whether axis 0 is the batch: else tokens of different sequences were mixed, or there is one set for all."""
        first = value[0] if isinstance(value, list | tuple) else value
        return isinstance(first, Tensor) and first.dim() > 0 and expression(first.shape[0]) == self.batch


# --- operations that may run on fewer tokens -------------------------------------------------------------------------

_F = torch.nn.functional

POINTWISE: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.and_),
    *(operator.or_, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.invert),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.sigmoid, torch.tanh, torch.relu, torch.clamp, torch.where, torch.abs, torch.square, torch.maximum),
    *(torch.minimum, _F.silu, _F.gelu, _F.relu, _F.softplus, _F.sigmoid, _F.tanh, torch._C._nn.gelu),
    *("add", "sub", "mul", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "relu", "clamp"),
    *("abs", "square", "masked_fill", "to", "type_as", "float", "half", "bfloat16", "double", "bool", "contiguous"),
    *("clone", "detach", "eq", "ne", "lt", "le", "gt", "ge"),
}
ALONG_AXES: set[Any] = {  # take ``dim``, which must be given and must not be the tokens'
    *(
        torch.mean,
        torch.sum,
        torch.softmax,
        _F.softmax,
        torch.amax,
        torch.amin,
        "mean",
        "sum",
        "softmax",
        "amax",
        "amin",
    ),
}
NORMS: set[Any] = {_F.layer_norm, _F.rms_norm}  # over the last axes, as many as ``normalized_shape`` has
RESHAPES: set[Any] = {"view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten}
VIEWS: set[Any] = {
    *("transpose", "permute", "squeeze", "unsqueeze", "expand", "chunk", "split", torch.transpose, torch.permute),
    *(torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.functional.split),
}
PRODUCTS: set[Any] = {operator.matmul, torch.matmul, "matmul"}
LINEAR: set[Any] = {_F.linear, torch._C._nn.linear}
CASTS: set[Any] = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone"}
IN_PLACE: set[Any] = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior, operator.ipow),
}


def inputs_with_tokens(node: Node, length: Length) -> Iterator[Node]:
    """The tensors that the node reads and that have a token axis, or depend on the length in an unclear way."""
    for source in node.all_input_nodes:
        if not length.is_number(source) and length.of(source) != NO_TOKENS:
            yield source


def is_one_result(node: Node) -> bool:
    """Whether the node takes one of several results of another."""
    return node.target is operator.getitem and isinstance(value_of(node.args[0]), list | tuple)


def is_tokenwise(node: Node, length: Length) -> bool:
    """Whether the node computes for the kept tokens just what it computes for them among all tokens."""
    if is_one_result(node):
        return True
    value, axis = value_of(node), length.of(node)
    sources = list(inputs_with_tokens(node, length))
    if axis < 0 or not sources or any(length.of(source) < 0 for source in sources):
        return False
    if not all(length.has_batch(v) for v in (value, *map(value_of, sources))):
        return False
    rank = _rank(value)
    if node.target in POINTWISE:  # aligned from the right, as broadcasting does
        return all(_rank(value_of(source)) - length.of(source) == rank - axis for source in sources)
    if node.target is operator.getitem:
        return _is_plain_index(node)
    if node.target in RESHAPES:  # the same number of rows before the axis: the tokens' data did not move
        source = sources[0]
        return _rows_before(value_of(source), length.of(source)) == _rows_before(value, axis)
    if node.target in VIEWS:
        return True
    if node.target in ALONG_AXES:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = dims if isinstance(dims, list | tuple) else [dims]
        known = all(isinstance(dim, int) and dim % rank not in (0, axis) for dim in dims)  # 0: other sequences
        return len(sources) == 1 and known and _rank(value_of(sources[0])) == rank and length.of(sources[0]) == axis
    if node.target in NORMS:
        shape = node.args[1] if len(node.args) > 1 else None
        return isinstance(shape, list | tuple) and sources == [node.args[0]] and axis < rank - len(shape)
    if node.target in LINEAR:
        return sources == [node.args[0]] and axis != rank - 1
    if node.target in PRODUCTS:
        return len(sources) == 1
    if node.target is _F.embedding:
        return True
    return node.target in (torch.ops.simba.causal_conv1d, torch.ops.simba.selective_scan)


def _rank(value: Any) -> int:
    return (value[0] if isinstance(value, list | tuple) else value).dim()


def _rows_before(value: Tensor, axis: int) -> sympy.Expr:
    return sympy.prod([expression(size) for size in value.shape[:axis]])


def _is_plain_index(node: Node) -> bool:
    _, index = node.args
    items = index if isinstance(index, tuple) else (index,)
    # The length is still whole, so a slice along it took everything, in order unless it stepped backwards (it cannot).
    return all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in items)


def is_inplace(node: Node) -> bool:
    """Whether the node writes into one of its inputs."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else target.__name__
    return name == "setitem" or target in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def written(node: Node) -> list[Node]:
    """What a node that `is_inplace` may write into: its first argument and ``out``; any argument of a custom operator."""
    out = node.kwargs.get("out")
    custom = isinstance(node.target, torch._ops.OpOverloadPacket | torch._ops.OpOverload)
    values = [*(out if isinstance(out, list | tuple) else [out]), *(node.args if custom else node.args[:1])]
    return [value for value in values if isinstance(value, Node)]


def storage_of(node: Node) -> int | None:
    """Which memory a value is in: views of one another have the same."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def takes_sizes(node: Node) -> bool:
    """Whether a number among the node's arguments is a size or a place: of pruned tokens, it is how many are left."""
    return node.target in RESHAPES | VIEWS or node.target is operator.getitem


def suffix(node: Node, length: Length) -> int | None:
    """k where the node is ``x[..., -k:, ...]`` along the tokens, with everything along the other axes."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or length.of(node.args[0]) < 0:
        return None
    source, index = node.args
    items = list(index) if isinstance(index, tuple) else [index]
    rank, axis = _rank(value_of(source)), length.of(source)
    if Ellipsis in [item if isinstance(item, type(Ellipsis)) else 0 for item in items]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    items += [slice(None)] * (rank - len(items))
    if len(items) != rank or not all(isinstance(item, slice) for item in items):
        return None
    if any(item != slice(None) for i, item in enumerate(items) if i != axis):
        return None
    cut = items[axis]
    start = _number(cut.start, length)  # type: ignore[union-attr]
    if cut.stop is not None or cut.step is not None or start is None or start >= 0:  # type: ignore[union-attr]
        return None
    return -start


def _number(value: Any, length: Length) -> int | None:
    """An integer argument's value, where it does not depend on the length.

    A symbolic one (``logits_to_keep`` after calls with different values) is fixed by a guard: the plan depends on it.
    """
    if isinstance(value, Node):
        value = value_of(value)
        if isinstance(value, torch.SymInt):
            return None if length.symbol in expression(value).free_symbols else int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

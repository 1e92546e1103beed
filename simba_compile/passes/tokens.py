"""Where a value of the graph has its tokens: the axis whose symbolic size is the sequence length.

Also what may run on fewer tokens than it was traced with. An operation may if it treats tokens alike and apart. Symbolic
sizes show most that do not (the axis is gone, or its size is another); what they cannot show is decided by short lists of
operations. What is not known to be safe is not.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from simba_compile.passes.scans import CONTRACT

NO_TOKENS = -1  # the value has no token axis
UNCLEAR = -2  # it depends on the length in another way: shifted, or along two axes
FLAT = -3  # axis 0 is batch and tokens in one, as a mixture of experts takes them


def value_of(node: Any) -> Any:
    """What Dynamo saw at a node: a fake tensor, a SymInt, a tuple of them. None for what is no node."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Length:
    """How many tokens a graph's mixers work on, as an expression of its inputs' sizes, and the axes that have it.

    Mostly that is an input's length. It may be one with some tokens more or fewer, as where a model puts a class token or
    the virtual tokens of prompt tuning before the others, and it may be the sum of several.

    Parameters
    ----------
    example : Tensor
        Any value of shape (batch, token, ...).
    """

    def __init__(self, example: Tensor) -> None:
        self.tokens = expression(example.shape[1])
        self.batch = expression(example.shape[0])
        self.rows = sympy.expand(self.batch * self.tokens)
        self.symbols = self.tokens.free_symbols
        self.terms = {symbol: self.tokens.coeff(symbol) for symbol in sorted(self.symbols, key=str)}
        self.fixed = self.tokens - sum(often * symbol for symbol, often in self.terms.items())
        self.is_sum = self.fixed.is_Integer and all(often.is_Integer and often > 0 for often in self.terms.values())

    @property
    def is_symbolic(self) -> bool:
        """Whether the length can vary, as a sum of sizes, and is not tied to the batch size."""
        return bool(self.symbols) and self.is_sum and not self.symbols & self.batch.free_symbols

    def depends(self, size: Any) -> bool:
        """Whether a size varies with the length."""
        return bool(expression(size).free_symbols & self.symbols) if isinstance(size, torch.SymInt) else False

    def axis(self, value: Any) -> int:
        """The token axis of a tensor, or of the tensors of a tuple that have one; NO_TOKENS, UNCLEAR or FLAT."""
        if isinstance(value, list | tuple):
            axes = {self.axis(item) for item in value} - {NO_TOKENS}
            return axes.pop() if len(axes) == 1 else UNCLEAR if axes else NO_TOKENS
        if isinstance(value, torch.SymInt):
            return UNCLEAR if self.depends(value) else NO_TOKENS
        if not isinstance(value, Tensor):
            return NO_TOKENS
        depends = [axis for axis, size in enumerate(value.shape) if self.depends(size)]
        if not depends:
            return NO_TOKENS
        if depends == [0] and sympy.expand(expression(value.shape[0])) == self.rows:
            return FLAT
        return depends[0] if len(depends) == 1 and expression(value.shape[depends[0]]) == self.tokens else UNCLEAR

    def is_square(self, value: Any) -> bool:
        """Whether it is a mask of attention: its last two axes have the length, and no other."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return False
        *others, queries, keys = value.shape
        return expression(queries) == expression(keys) == self.tokens and not any(map(self.depends, others))

    def of(self, node: Any) -> int:
        """The token axis of a node's value."""
        return self.axis(value_of(node))

    def is_number(self, node: Node) -> bool:
        """Whether the node is an integer that depends on the length, or a tuple of integers such as a shape."""
        value = value_of(node)
        items = value if isinstance(value, list | tuple) else [value]
        return any(map(self.depends, items)) and all(isinstance(item, int | torch.SymInt) for item in items)

    def find(self, inputs: Iterable[Node]) -> list[tuple[int, int | None]]:
        """Where a call's arguments show the sizes whose sum, with `fixed`, is the length.

        Each is (argument, axis), or (argument, None) where the argument is the size.
        """
        if not self.is_sum:
            raise ValueError(f"the length {self.tokens} is no sum of sizes")
        values = list(map(value_of, inputs))
        return [place for size, often in self.terms.items() for place in [_place(size, values)] * int(often)]

    def reader(self, inputs: Iterable[Node]) -> Callable[[Sequence[Any]], Any]:
        """What reads the length off the arguments of a call: an integer, or a symbolic one while tracing."""
        places, fixed = self.find(inputs), int(self.fixed)
        return lambda args: sum((args[at] if axis is None else args[at].shape[axis] for at, axis in places), fixed)

    def batch_axis(self, value: Any) -> int | None:
        """The axis that counts sequences, or None where none does, or none alone: sequences are then not told apart."""
        if self.axis(value) == FLAT:
            return 0
        first = value[0] if isinstance(value, list | tuple) else value
        if not isinstance(first, Tensor):
            return None
        sizes = [expression(size) for size in first.shape]
        if self.batch == 1:
            return sizes.index(self.batch) if self.batch in sizes else None
        symbols = self.batch.free_symbols
        depends = [axis for axis, size in enumerate(sizes) if size == self.batch or size.free_symbols & symbols]
        return depends[0] if len(depends) == 1 and sizes[depends[0]] == self.batch else None

    def is_shared(self, value: Any) -> bool:
        """Whether it is one for every sequence, as positions are: (1, ..., token, ...)."""
        if not isinstance(value, Tensor) or value.dim() == 0 or expression(value.shape[0]) != 1:
            return False
        return not any(expression(size).free_symbols & self.batch.free_symbols for size in value.shape)


def _place(size: sympy.Expr, values: Sequence[Any]) -> tuple[int, int | None]:
    """The first of the values that is this size or has an axis of it, and which."""
    for place, value in enumerate(values):
        if isinstance(value, torch.SymInt) and expression(value) == size:
            return place, None
        sizes = list(map(expression, value.shape)) if isinstance(value, Tensor) else []
        if size in sizes:
            return place, sizes.index(size)
    raise ValueError(f"no input of the graph has the length {size}")


# --- operations that may run on fewer tokens -------------------------------------------------------------------------

_F = torch.nn.functional

POINTWISE: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.and_),
    *(operator.or_, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.invert),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.sigmoid, torch.tanh, torch.relu, torch.clamp, torch.where, torch.abs, torch.square, torch.maximum),
    *(torch.minimum, _F.silu, _F.gelu, _F.relu, _F.softplus, _F.sigmoid, _F.tanh, torch._C._nn.gelu),
    *("add", "sub", "mul", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "relu", "clamp"),
    *("abs", "square", "masked_fill", "to", "type_as", "type", "float", "half", "bfloat16", "double", "bool"),
    *("contiguous", "clone", "detach", "eq", "ne", "lt", "le", "gt", "ge", "cos", "sin", torch.cos, torch.sin),
    *(torch.zeros_like, torch.ones_like, operator.floordiv, _F.relu6, _F.leaky_relu, _F.hardswish, _F.mish, _F.elu),
    *(_F.dropout, torch.floor_divide),
}
ALONG_AXES: dict[Any, Any] = {  # with the ``dim`` where none is given; it must be neither the tokens' nor the batch's
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, torch.amin, torch.softmax, _F.softmax, torch.cumsum), None),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "softmax", "cumsum", torch.gather, torch.scatter), None),
    **dict.fromkeys(("gather", "scatter"), None),
    **dict.fromkeys((torch.topk, torch.sort), -1),
    **dict.fromkeys(("topk", "sort"), -1),
}
DIM_AT = {torch.topk: 2, "topk": 2}  # where ``dim`` stands among the arguments; elsewhere it is the second
REORDERS: set[Any] = {  # may put what stands along an axis in another order
    *("flip", "fliplr", "roll", "sort", "msort", "gather", "index_select", "take_along_dim"),
    *(torch.flip, torch.fliplr, torch.roll, torch.sort, torch.msort, torch.gather, torch.index_select, torch.take_along_dim),
}
CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate, torch.stack}
NORMS: set[Any] = {_F.layer_norm, _F.rms_norm, torch.rms_norm}  # over the last axes; Dynamo has the third for the second
RESHAPES: set[Any] = {"view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten}
SPLITS: set[Any] = {"chunk", "split", torch.chunk, torch.split, torch.functional.split}
VIEWS: set[Any] = SPLITS | {
    *("transpose", "permute", "squeeze", "unsqueeze", "expand", torch.transpose, torch.permute),
    *(torch.squeeze, torch.unsqueeze),
}
SAME_MEMORY: set[Any] = {*VIEWS, *RESHAPES, operator.getitem}  # give views of what they read, as a rule
PRODUCTS: set[Any] = {operator.matmul, torch.matmul, "matmul"}
MUL: set[Any] = {operator.mul, torch.mul, "mul"}
LINEAR: set[Any] = {_F.linear, torch._C._nn.linear}
TO_TYPE: set[Any] = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}
CASTS: set[Any] = TO_TYPE | {"contiguous", "clone"}


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
    value, kind = value_of(node), length.of(node)
    sources = list(inputs_with_tokens(node, length))
    kinds = {length.of(source) for source in sources}
    if not sources or UNCLEAR in kinds | {kind} or kind == NO_TOKENS:
        return False
    values = list(map(value_of, sources))
    if any(length.batch_axis(v) is None for v in (value, *values) if not length.is_shared(v)):
        return False
    if length.batch_axis(value) is None and not all(map(length.is_shared, values)):
        return False  # it takes one sequence out of the batch
    if node.target in RESHAPES:
        return _keeps_rows(value_of(sources[0]), value, length)
    if FLAT in kinds and kinds != {FLAT}:
        return False
    rank, axis = _rank(value), max(kind, 0)
    ends = {_rank(value_of(source)) - max(length.of(source), 0) for source in sources}  # the token axis from the right
    if node.target in POINTWISE:  # aligned from the right, as broadcasting does
        return ends == {rank - axis} and _is_repeated(node, rank - axis, sources)
    if node.target is operator.getitem:
        return _is_plain_index(node)
    if node.target in VIEWS:
        return len(node.args) + len(node.kwargs) > 1  # a bare squeeze() would take a token axis of one away
    if node.target in ALONG_AXES:
        if any(isinstance(value_of(given), Tensor) and given not in sources for given in node.all_input_nodes):
            return False  # an index without tokens, whose rows are those of the first ones
        at = DIM_AT.get(node.target, 1)
        dims = node.kwargs.get("dim", node.args[at] if len(node.args) > at else ALONG_AXES[node.target])
        dims = dims if isinstance(dims, list | tuple) else [dims]
        (given, *others) = {(_rank(v), max(length.axis(v), 0), length.batch_axis(v)) for v in values}
        taken = given[1:]
        return not others and all(isinstance(dim, int) and dim % given[0] not in taken for dim in dims)
    if node.target in CONCATENATIONS:
        return _joins_elsewhere(node, rank, axis, length)
    if node.target in NORMS:
        shape = node.args[1] if len(node.args) > 1 else None
        return isinstance(shape, list | tuple) and sources == [node.args[0]] and axis < rank - len(shape)
    if node.target in LINEAR:
        return sources == [node.args[0]] and axis != rank - 1
    if node.target in PRODUCTS:
        return len(sources) == 1 and (rank - axis <= 2 or _is_repeated(node, rank - axis, sources))
    if node.target is _F.embedding:
        return sources == [node.args[0]]  # a table with tokens is looked up in among them
    return node.target in CONTRACT


def _is_repeated(node: Node, end: int, sources: list[Node]) -> bool:
    """Whether what has no tokens is the same for each: it has one row, or none, along the axis `end` from the right."""
    others = [value_of(operand) for operand in node.all_input_nodes if operand not in sources]
    tensors = [value for value in others if isinstance(value, Tensor)]
    return all(value.dim() < end or expression(value.shape[-end]) == 1 for value in tensors)


def reorders(node: Node, length: Length) -> bool:
    """Whether the node may put tokens in another order: their places would be those of others."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or NO_TOKENS in (length.of(source), length.of(node)) or is_tokenwise(node, length):
        return False
    return node.target in REORDERS or (node.target is operator.getitem and not _is_plain_index(node))


def _keeps_rows(source: Tensor, value: Tensor, length: Length) -> bool:
    """Whether a reshape leaves each token's numbers together and in place."""
    if FLAT in (length.axis(source), length.axis(value)):  # batch and token axes become one, or one becomes two
        whole = [v for v in (source, value) if length.axis(v) != FLAT]
        return all(length.axis(v) == 1 and expression(v.shape[0]) == length.batch for v in whole)
    return _rows_before(source, length.axis(source)) == _rows_before(value, length.axis(value))


def _joins_elsewhere(node: Node, rank: int, axis: int, length: Length) -> bool:
    """Whether a concatenation is along another axis than the tokens', or of one value with empty ones."""
    parts = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, list | tuple) or not isinstance(dim, int) or not all(isinstance(p, Node) for p in parts):
        return False
    dim %= rank
    full: list[Node] = [part for part in parts if 0 not in value_of(part).shape]  # type: ignore[union-attr, misc]
    if len(full) == 1 and node.target is not torch.stack:
        return True
    was = axis - 1 if node.target is torch.stack and dim < axis else axis
    apart = dim not in (axis, length.batch_axis(value_of(node)))
    return apart and all(max(length.of(part), 0) == was and length.of(part) != NO_TOKENS for part in full)


def _rank(value: Any) -> int:
    return (value[0] if isinstance(value, list | tuple) else value).dim()


def _rows_before(value: Tensor, axis: int) -> sympy.Expr:
    return sympy.prod([expression(size) for size in value.shape[:axis]])


def _is_plain_index(node: Node) -> bool:
    _, index = node.args
    items = index if isinstance(index, tuple) else (index,)
    # The length is still whole, so a slice along it took everything, in order unless it stepped backwards (it cannot).
    return all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in items)


def is_simba(node: Node) -> bool:
    """Whether the node calls an operator `simba::*`."""
    return getattr(node.target, "_qualified_op_name", "").startswith("simba::")


def takes_sizes(node: Node) -> bool:
    """Whether a number among the node's arguments is a size or a place: of pruned tokens, it is how many are left."""
    return node.target in SAME_MEMORY


def suffix(node: Node, length: Length) -> int | None:
    """k where the node is ``x[..., -k:, ...]`` along the tokens, with everything along the other axes, or `last_tokens`."""
    if node.target is torch.ops.simba.last_tokens:
        source, k, dim = node.args
        return k if length.of(source) == dim else None  # type: ignore[return-value]
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or length.of(node.args[0]) < 0:
        return None
    source, index = node.args
    items = list(index) if isinstance(index, tuple) else [index]
    rank, axis = _rank(value_of(source)), length.of(source)
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    if at is not None:
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
    value = value_of(value) if isinstance(value, Node) else value
    if isinstance(value, torch.SymInt):
        return None if length.depends(value) else int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

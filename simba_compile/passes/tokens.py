"""What may run on fewer tokens than it was traced with. An operation may if it treats tokens alike and apart.

Symbolic sizes show most that do not (the axis is gone, or its size is another); what they cannot show is decided by
torch's tag of what is pointwise, and by short lists of operations. What is not known to be safe is not.
"""

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import TensorPropertySource
from torch.fx import Node

from simba_compile.passes.length import FLAT, NO_TOKENS, UNCLEAR, Length, expression, value_of
from simba_compile.passes.scans import MIXER_OPERATORS

_F = torch.nn.functional


def _is_pointwise(name: str) -> bool:
    """Whether all that torch calls by this name computes each element from those at its place: it has tags for that."""
    packet = getattr(torch.ops.aten, name, None)
    if name.startswith("_") or not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    forms = [getattr(packet, overload) for overload in packet.overloads()]
    forms = [form for form in forms if not form._schema.is_mutable and _takes_and_gives_a_tensor(form._schema)]
    is_random = any(torch.Tag.nondeterministic_seeded in form.tags for form in forms)
    return bool(forms) and not is_random and all(torch.Tag.pointwise in form.tags for form in forms)


def _takes_and_gives_a_tensor(schema: torch.FunctionSchema) -> bool:
    types = [str(value.type) for value in (*schema.arguments[:1], *schema.returns)]
    return types == ["Tensor", "Tensor"]


POINTWISE: set[Any] = {
    *(name for name in dir(Tensor) if _is_pointwise(name)),
    *(getattr(space, name) for space in (torch, _F) for name in dir(space) if _is_pointwise(name)),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.and_, operator.xor),
    *(operator.or_, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.invert),
    *(operator.floordiv, operator.mod, torch.floor_divide, torch.where, _F.hardswish, _F.leaky_relu, _F.dropout),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.polar, torch.complex),
    *("masked_fill", "to", "type_as", "type", "float", "half", "bfloat16", "double", "bool", "contiguous", "detach"),
}
_ALONG_AXES = (  # as methods, and as functions
    *("mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "median", "any", "all", "count_nonzero"),
    *("var", "std", "nansum", "nanmean", "logsumexp", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp"),
    *("cummax", "cummin", "kthvalue", "norm", "sort", "argsort", "topk", "flip", "roll", "repeat_interleave"),
    *("index_select", "gather", "scatter", "scatter_add", "scatter_reduce"),
)
ALONG_AXES: dict[Any, Any] = {  # with the ``dim`` where none is given; it must be neither the tokens' nor the batch's
    **dict.fromkeys((*_ALONG_AXES, *(getattr(torch, name) for name in _ALONG_AXES)), None),
    **dict.fromkeys((torch.var_mean, torch.std_mean, torch.linalg.norm, torch.linalg.vector_norm), None),
    **dict.fromkeys((_F.softmax, _F.log_softmax), None),
    **dict.fromkeys((torch.topk, torch.sort, torch.argsort, torch.kthvalue, _F.glu), -1),
    **dict.fromkeys(("topk", "sort", "argsort", "kthvalue"), -1),
    **dict.fromkeys((_F.normalize, _F.cosine_similarity), 1),
}
DIM_AT = {  # where ``dim`` stands among the arguments; elsewhere it is the second
    **dict.fromkeys((torch.topk, "topk", torch.roll, "roll", torch.repeat_interleave, "repeat_interleave"), 2),
    **dict.fromkeys((torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm, torch.kthvalue, "kthvalue"), 2),
    **dict.fromkeys((_F.normalize, _F.cosine_similarity), 2),
}
_REORDERING = (
    *("flip", "fliplr", "flipud", "rot90", "roll", "sort", "msort", "gather", "index_select", "take_along_dim"),
    *("scatter", "scatter_add", "scatter_reduce", "masked_scatter", "put"),
    *("index_copy", "index_add", "index_reduce", "index_put"),
)
# May put what stands along an axis in another order: as methods, and as functions.
REORDERS: set[Any] = {*_REORDERING, *(getattr(torch, name) for name in _REORDERING)}
CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate, torch.stack}
ZEROS: set[Any] = {torch.zeros, torch.zeros_like, "new_zeros"}
PAD = torch._C._nn.pad  # Dynamo has it for torch.nn.functional.pad
NORMS: set[Any] = {_F.layer_norm, _F.rms_norm, torch.rms_norm}  # over the last axes; Dynamo has the third for the second
RESHAPES: set[Any] = {"view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten}
SPLITS: set[Any] = {"chunk", "split", torch.chunk, torch.split, torch.functional.split}
VIEWS: set[Any] = SPLITS | {
    *("transpose", "permute", "squeeze", "unsqueeze", "expand", torch.transpose, torch.permute),
    *(torch.squeeze, torch.unsqueeze, "movedim", "moveaxis", torch.movedim, torch.moveaxis),
    *(torch.view_as_complex, torch.view_as_real, torch.real, torch.imag),
    *("unbind", "tensor_split", "select", "narrow", torch.unbind, torch.tensor_split, torch.select, torch.narrow),
}
SAME_MEMORY: set[Any] = {*VIEWS, *RESHAPES, operator.getitem}  # give views of what they read, as a rule
REPEATS: set[Any] = {"repeat", "tile", torch.tile}
LOOKUPS: set[Any] = {_F.embedding, torch._C._nn.one_hot}
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
    if node.target in REPEATS:
        return _repeats_elsewhere(node, axis, length)
    if node.target in VIEWS:
        is_bare = len(node.args) + len(node.kwargs) == 1
        return not (is_bare and node.target in ("squeeze", torch.squeeze))  # it would take a token axis of one away
    if node.target in ALONG_AXES:
        return _is_along_other_axes(node, sources, length)
    if node.target in CONCATENATIONS:
        return _joins_elsewhere(node, rank, axis, length)
    if node.target in NORMS:
        shape = node.args[1] if len(node.args) > 1 else None
        return isinstance(shape, list | tuple) and sources == [node.args[0]] and axis < rank - len(shape)
    if node.target in LINEAR:
        return sources == [node.args[0]] and axis != rank - 1
    if node.target in PRODUCTS:
        return len(sources) == 1 and (rank - axis <= 2 or _is_repeated(node, rank - axis, sources))
    if node.target is torch.einsum:
        return _is_one_letter_throughout(node, sources, length)
    if node.target in LOOKUPS:
        return sources == [node.args[0]]  # a table with tokens is looked up in among them
    return node.target in MIXER_OPERATORS


def _is_repeated(node: Node, end: int, sources: list[Node]) -> bool:
    """Whether what has no tokens is the same for each: it has one row, or none, along the axis `end` from the right."""
    others = [value_of(operand) for operand in node.all_input_nodes if operand not in sources]
    tensors = [value for value in others if isinstance(value, Tensor)]
    return all(value.dim() < end or expression(value.shape[-end]) == 1 for value in tensors)


def _is_along_other_axes(node: Node, sources: list[Node], length: Length) -> bool:
    """Whether an operation along axes leaves alone the tokens' axis and the batch's, which are the same in all it reads."""
    selects = node.target in (torch.index_select, "index_select")
    if not selects and any(isinstance(value_of(read), Tensor) and read not in sources for read in node.all_input_nodes):
        return False  # an index without tokens, whose rows are those of the first ones
    layouts = {(_rank(value), max(length.axis(value), 0), length.batch_axis(value)) for value in map(value_of, sources)}
    if len(layouts) != 1:
        return False
    ((rank, *taken),) = layouts
    at = DIM_AT.get(node.target, 1)
    dims = node.kwargs.get("dim", node.args[at] if len(node.args) > at else ALONG_AXES[node.target])
    if node.target == "flip" and isinstance(dims, int):
        dims = node.args[at:]
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return all(type(dim) is int and dim % rank not in taken for dim in dims)  # a truth says something else


def reorders(node: Node, length: Length) -> bool:
    """Whether the node may put tokens in another order: their places would be those of others."""
    if length.of(node) == NO_TOKENS or is_tokenwise(node, length):
        return False
    if node.target in CONCATENATIONS:
        return _swaps_pieces(node, length)
    takes = node.target in REORDERS or (node.target is operator.getitem and not _is_plain_index(node))
    return takes and bool(node.args) and length.of(node.args[0]) != NO_TOKENS


def _swaps_pieces(node: Node, length: Length) -> bool:
    """Whether a concatenation of tokens has pieces of one value in another order: ``cat([x[:, 1:], x[:, :1]], 1)``."""
    parts, axis = _joined(node)
    if axis is None or not length.depends(value_of(node).shape[axis]):
        return False
    pieces = [_piece(part, axis) for part in parts]
    return any(
        of is other and _is_before(start, first) for (other, first), (of, start) in itertools.combinations(pieces, 2) if of
    )


def _joined(node: Node) -> tuple[Sequence[Any], int | None]:
    """What a concatenation joins, and along which axis of the result; None where that is not told."""
    parts = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, list | tuple) or not isinstance(dim, int):
        return (), None
    return parts, dim % _rank(value_of(node))


def _piece(part: Any, axis: int) -> tuple[Node | None, Any]:
    """What a value is a piece of, if of one, and where along the axis the piece begins."""
    while isinstance(part, Node) and part.target in CASTS:
        part = part.args[0]
    source = part.args[0] if isinstance(part, Node) and part.args else None
    if not isinstance(source, Node):
        return None, None
    if is_one_result(part):  # of a split
        return source, part.args[1]
    if part.target in ("narrow", torch.narrow) and len(part.args) > 2:
        return source, part.args[2]
    slices = _slices(part)
    return (None, None) if slices is None or len(slices) <= axis else (source, slices[axis].start or 0)


def _is_before(start: Any, other: Any) -> bool:
    """Whether a place along an axis is known to be before another one; negative ones count from the end."""
    if not isinstance(start, int):
        return False
    return other != 0 if start == 0 else isinstance(other, int) and start < other and (start < 0) == (other < 0)


def _keeps_rows(source: Tensor, value: Tensor, length: Length) -> bool:
    """Whether a reshape leaves each token's numbers together and in place."""
    if FLAT in (length.axis(source), length.axis(value)):  # batch and token axes become one, or one becomes two
        whole = [v for v in (source, value) if length.axis(v) != FLAT]
        return all(length.axis(v) == 1 and expression(v.shape[0]) == length.batch for v in whole)
    return _rows_before(source, length.axis(source)) == _rows_before(value, length.axis(value))


def _joins_elsewhere(node: Node, rank: int, axis: int, length: Length) -> bool:
    """Whether a concatenation is along another axis than the tokens', or of one value with empty ones."""
    parts, dim = _joined(node)
    if dim is None or not all(isinstance(part, Node) for part in parts):
        return False
    full: list[Node] = [part for part in parts if 0 not in value_of(part).shape]
    if len(full) == 1 and node.target is not torch.stack:
        return True
    was = axis - 1 if node.target is torch.stack and dim < axis else axis
    apart = dim not in (axis, length.batch_axis(value_of(node)))
    return apart and all(max(length.of(part), 0) == was and length.of(part) != NO_TOKENS for part in full)


def _repeats_elsewhere(node: Node, axis: int, length: Length) -> bool:
    """Whether neither the tokens nor the sequences are repeated, nor stand along other axes than before."""
    source: Any = value_of(node.args[0])
    given: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    often = [*[1] * (source.dim() - len(given)), *given]  # as `tile` takes fewer
    batch = length.batch_axis(source)
    return len(often) == source.dim() and often[axis] == 1 and (batch is None or often[batch] == 1)


def _is_one_letter_throughout(node: Node, sources: list[Node], length: Length) -> bool:
    """Whether an einsum has one letter for tokens and one for sequences, in what has them and in the result."""
    equation, *factors = node.args
    if not isinstance(equation, str) or not all(isinstance(factor, Node) for factor in factors):
        return False
    terms, arrow, out = equation.replace(" ", "").partition("->")
    read = [_letters(term, value_of(factor)) for term, factor in zip(terms.split(","), factors, strict=True)]
    made, batch = _letters(out, value_of(node)), length.batch_axis(value_of(node))
    token = made[max(length.of(node), 0)]
    for letters, factor in zip(read, factors, strict=True):
        axis = length.batch_axis(value_of(factor))
        if factor in sources and (axis is None or batch is None or letters[axis] != made[batch]):
            return False
        if factor in sources and letters[max(length.of(factor), 0)] != token:
            return False
    times = [letters.count(token) for letters in (made, *read)]
    return bool(arrow) and times == [1, *(int(factor in sources) for factor in factors)]


def _letters(term: str, value: Tensor) -> list[str]:
    """The letter of each axis; axes of an ellipsis are numbered from the right, as they are aligned."""
    before, _, after = term.partition("...")
    return [*before, *map(str, range(value.dim() - len(before) - len(after), 0, -1)), *after]


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


def suffix(node: Node, length: Length) -> int | torch.SymInt | None:
    """k where the node is ``x[..., -k:, ...]`` along the tokens, with everything along the other axes, or `last_tokens`.

    Symbolic where calls give it and it has varied, as ``logits_to_keep`` may.
    """
    if node.target is torch.ops.simba.last_tokens:
        source, k, dim = node.args
        return k if length.of(source) == dim else None  # type: ignore[return-value]
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or length.of(node.args[0]) < 0:
        return None
    slices, axis = _slices(node), length.of(node.args[0])
    if slices is None or any(item != slice(None) for i, item in enumerate(slices) if i != axis):
        return None
    cut = slices[axis]
    start = _number(cut.start, length)
    if cut.stop is not None or cut.step is not None or start is None or start >= 0:
        return None
    return -start


def _slices(node: Node) -> list[slice] | None:
    """The slice of each axis that ``x[...]`` takes; None where it does anything else."""
    source, index = node.args if node.target is operator.getitem else (None, None)
    if not isinstance(value_of(source), Tensor):
        return None
    items, rank = list(index) if isinstance(index, tuple) else [index], _rank(value_of(source))
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    if at is not None:
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    items += [slice(None)] * (rank - len(items))
    found = [item for item in items if isinstance(item, slice)]
    return found if len(found) == len(items) == rank else None


def _number(argument: Any, length: Length) -> int | torch.SymInt | None:
    """An integer argument's value, where it does not depend on the length."""
    value = value_of(argument) if isinstance(argument, Node) else argument
    if isinstance(value, torch.SymInt):
        return None if length.depends(value) and not _is_given(argument) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_given(node: Node) -> bool:
    """Whether it is ``-k``, where a call gives k. It may be as many as there are tokens, and have their symbol.

    ``-n`` of a size n of a tensor reads all tokens, if there are n: as where nothing is cut off, none is protected for it.
    """
    given = node.args[0].meta.get("grapharg") if node.target is operator.neg else None  # type: ignore[union-attr]
    return given is not None and not isinstance(given.source, TensorPropertySource)

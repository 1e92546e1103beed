"""Fuse the norms: an RMS norm, Mamba-2's with its gate, and one with the residual add before it."""

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from simba_compile.passes.edit import dtype_of, insert, is_stale, may_move, rank_of, replace, sizes
from simba_compile.passes.length import value_of
from simba_compile.passes.match import ADDS
from simba_compile.passes.tokens import CASTS, MUL, RESHAPES, TO_TYPE

OPS = torch.ops.simba
POW, RSQRT, MEAN = (
    {"pow", torch.pow, operator.pow},
    {torch.rsqrt, "rsqrt"},
    {"mean", torch.mean},
)


def fuse_norm(node: Node) -> None:
    """``weight * (h * rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)`` of h = x.float(): rms_norm(x, weight, eps).

    The product with the weight is optional: with none, the inner product is what is replaced. Some families round after it.
    """
    weight, inner, product = None, node, _through_cast(node)
    if product.target in MUL and (product is node or len(product.users) == 1):
        for a, b in (product.args, reversed(product.args)):
            if isinstance(b, Node) and rank_of(a) == 1 and _norm_of(_through_cast(b)):
                weight, inner = a, b
    found = _norm_of(_through_cast(inner))
    if found is None or (weight is None and any(_takes_weight(user) for user in _users_through_casts(node))):
        return
    h, eps = found
    if weight is not None and sizes(weight) != sizes(h)[-1:]:  # type: ignore[arg-type]
        return
    x = _through_cast(h)
    if is_stale(inner, node, x):  # type: ignore[arg-type]
        return
    if dtype_of(node) != dtype_of(x):
        return  # without a weight, the cast back comes later and is where this is fused
    replace(node, insert(node, OPS.rms_norm, x, weight, eps))


def fuse_gated_norm(node: Node) -> None:
    """The norm after the scan of Mamba-2: gated_norm(x, z, weight, eps, groups).

    ``weight * (h * rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).view(y.shape)`` of ``h = y.view(..., groups, -1)`` and
    ``y = x * silu(z)``, or without the views.
    """
    if node.target not in MUL or len(node.args) != 2:
        return
    for weight, b in (node.args, reversed(node.args)):
        if not isinstance(weight, Node) or not isinstance(b, Node) or rank_of(weight) != 1:
            continue
        flat = _through_cast(b)
        grouped = flat.args[0] if flat.target in RESHAPES and isinstance(flat.args[0], Node) else None
        found = _norm_of(grouped or flat)
        if found is None:
            continue
        (y, eps), groups = found, 1
        if grouped is not None:
            if y.target not in RESHAPES or not isinstance(y.args[0], Node):
                continue
            y, groups = y.args[0], sizes(grouped)[-2]
            if sizes(grouped)[:-2] != sizes(y)[:-1]:
                continue
        if y.target not in MUL or len(y.all_input_nodes) != 2 or sizes(y) != sizes(node):
            continue
        x, gate = (_through_cast(arg) for arg in y.args)  # type: ignore[arg-type]
        if gate.target is not F.silu or dtype_of(node) != dtype_of(x) or sizes(weight) != sizes(y)[-1:]:
            continue
        gate = _through_cast(gate.args[0])  # type: ignore[arg-type]
        if sizes(x) == sizes(gate) == sizes(y) and not is_stale(b, node, x, gate):
            replace(node, insert(node, OPS.gated_norm, x, gate, weight, eps, int(groups)))
        return


def fuse_rounding(node: Node) -> None:
    """``gated_norm(…).to(dtype)``: a norm that rounds to that type itself, as out_proj of half a precision wants it."""
    if node.target not in TO_TYPE or not isinstance(node.args[0], Node):
        return
    norm, dtype = node.args[0], dtype_of(node)
    if norm.target is not OPS.gated_norm or len(norm.args) > 5 or len(norm.users) > 1 or node.kwargs.get("memory_format"):
        return
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or value_of(norm).device != value_of(node).device:
        return
    if may_move(norm, node, *norm.all_input_nodes):
        replace(node, insert(node, OPS.gated_norm, *norm.args, dtype))


def _through_cast(node: Node) -> Node:
    return node.args[0] if node.target in CASTS and isinstance(node.args[0], Node) else node


def _users_through_casts(node: Node) -> list[Node]:
    users = list(node.users)
    return users + [far for user in users if user.target in CASTS for far in user.users]


def _takes_weight(node: Node) -> bool:
    return node.target in MUL and any(rank_of(arg) == 1 for arg in node.args)


def _norm_of(node: Node) -> tuple[Node, float] | None:
    """(h, eps) where the node is ``h * rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)``.

    An eps that Dynamo has as a symbol, since another model's was another, is fixed by a guard.
    """
    if node.target not in MUL or not all(isinstance(arg, Node) for arg in node.args):
        return None
    h, root = node.args
    if root.target not in RSQRT:  # type: ignore[union-attr]
        return None
    shifted: Node = root.args[0]  # type: ignore[assignment, union-attr]
    if shifted.target not in ADDS or shifted.kwargs:
        return None
    eps = value_of(shifted.args[1]) if isinstance(shifted.args[1], Node) else shifted.args[1]
    if not isinstance(eps, float | torch.SymFloat):
        return None
    mean: Node = shifted.args[0]  # type: ignore[assignment]
    if mean.target not in MEAN or mean.args[1:] not in ((-1,), ((-1,),), ([-1],)) or mean.kwargs != {"keepdim": True}:
        return None
    square: Node = mean.args[0]  # type: ignore[assignment]
    if square.target not in POW or square.args != (h, 2):
        return None
    return h, float(eps)  # type: ignore[return-value]


def fuse_add_norm(node: Node) -> None:
    """``rms_norm((residual + x).to(x.dtype), weight, eps)``: one operator, which gives the sum, too.

    Where the residual is gathered for it, the operator gathers as it loads. A sum that is returned stays apart: beside the
    norm, its gradient would miss what comes through it.
    """
    if node.target is not OPS.rms_norm:
        return
    rounded: Node = node.args[0]  # type: ignore[assignment]
    total = _through_cast(rounded)
    if total.target not in ADDS or len(total.args) != 2 or total.kwargs or _is_read_before(total, node, rounded):
        return
    if total is not rounded and len(rounded.users) > 1:
        return
    if any(user.op == "output" for user in total.users):
        return
    for residual, x in sorted((total.args, total.args[::-1]), key=lambda pair: not _is_gathered(pair[0])):
        if not isinstance(residual, Node) or not isinstance(x, Node) or not sizes(total) == sizes(residual) == sizes(x):
            continue
        kind = dtype_of(residual)
        if dtype_of(total) != kind or dtype_of(node) != dtype_of(x) or kind not in (dtype_of(x), torch.float32):
            continue
        if is_stale(rounded, node, residual, x):
            continue
        index = None
        if _is_gathered(residual) and may_move(residual, node, *residual.args[:2]):  # type: ignore[arg-type]
            residual, index = residual.args[:2]  # type: ignore[assignment]
        both = insert(node, OPS.add_norm, residual, x, *node.args[1:], index)
        both.meta = {"example_value": (value_of(total), value_of(node))}
        stream, out = (insert(node, operator.getitem, both, i) for i in (0, 1))
        replace(total, stream)
        replace(node, out)
        return


def _is_gathered(node: object) -> bool:
    """Whether it is tokens gathered for one reader, each sequence's own."""
    if not isinstance(node, Node) or node.target is not OPS.gather or len(node.users) != 1 or node.args[2] != 1:
        return False
    return rank_of(node) == 3 and sizes(node.args[0])[0] == sizes(node)[0]


def _is_read_before(value: Node, node: Node, but: Node) -> bool:
    """Whether something else than one node reads a value before a node does."""
    step = value
    while step is not node:
        step = step.next
        if step in value.users and step not in (node, but):
            return True
    return False

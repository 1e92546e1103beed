"""Write what a model computes with its tokens last as operations on rows, one for each token.

mamba_ssm has its activations as (batch, channel, token), and as (channel, batch · token) around its products; where
causal_conv1d is not installed it takes PyTorch's convolution and cuts its output. The passes want tokens in axis 1, the
kernels are fastest there, and the convolution is one of the operators that `match` looks for:

``(W @ h.permute(2, 0, 1).reshape(c, b * l)).reshape(d, b, l).permute(1, 0, 2)``  →  ``linear(h, W).transpose(1, 2)``
``silu(conv1d(x, w, padding=k - 1, groups=c)[..., :l])``  →  ``causal_conv1d(x.transpose(1, 2), w, True).transpose(1, 2)``
``silu(conv1d(pad(x, (k - 1, 0)), w, groups=c))``  →  the same
``pad(x, (k - l, 0))``, the window that a cache keeps  →  ``last_tokens(x, k)``
``h.transpose(1, 2).chunk(2, dim=1)``, of each piece  →  ``h.chunk(2, dim=-1)[i].transpose(1, 2)``
"""

import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from simba_compile.kernels.native.conv import MAX_WIDTH
from simba_compile.passes.edit import insert_traced, is_swap, may_move, replace, sizes
from simba_compile.passes.length import value_of
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.pieces import split_axis
from simba_compile.passes.tokens import CONCATENATIONS, PAD, PRODUCTS, RESHAPES, ZEROS

OPS = torch.ops.simba


def make_rows(graph: Graph) -> None:
    """Run over a graph, in place."""
    for rewrite in (swap_as_transpose, project_rows, convolve_rows, keep_window, split_rows):
        for node in list(graph.nodes):
            if node.op in ("call_function", "call_method"):
                rewrite(node)


def swap_as_transpose(node: Node) -> None:
    """``x.permute(0, 2, 1)``: ``x.transpose(1, 2)``."""
    if _permutes(node, (0, 2, 1)):
        node.op, node.target, node.args, node.kwargs = "call_method", "transpose", (node.args[0], 1, 2), {}


def project_rows(node: Node) -> None:
    """A product with batch and tokens in its last axis, which are taken apart after it: a linear layer."""
    if node.target not in PRODUCTS or len(node.args) != 2 or not all(isinstance(arg, Node) for arg in node.args):
        return
    weight, rows = node.args[0], _rows_of(node.args[1])  # type: ignore[arg-type]
    apart = _only_user(node)
    swapped = _only_user(apart)
    if rows is None or apart is None or swapped is None or len(sizes(weight)) != 2:
        return
    if apart.target not in RESHAPES or not _permutes(swapped, (1, 0, 2)):
        return
    given = apart.args[1] if isinstance(apart.args[1], list | tuple) else apart.args[1:]
    if len(given) != 3:  # the shape of another value
        return
    if not may_move(node.args[1], swapped, rows, weight):  # type: ignore[arg-type]
        return
    _, batch, tokens = sizes(apart)
    is_flat = len(sizes(rows)) == 2
    if sizes(rows)[:-1] != ([batch * tokens] if is_flat else [batch, tokens]):
        return
    new = insert_traced(swapped, F.linear, rows, weight)
    if is_flat:
        channels, *places = given  # type: ignore[misc]
        new = insert_traced(swapped, "reshape", new, (*places, channels))
    replace(swapped, insert_traced(swapped, "transpose", new, 1, 2))


def _rows_of(across: Node) -> Node | None:
    """What a (channel, batch · token) value is made of, as (batch, token, channel) or (batch · token, channel)."""
    if across.target == "t":
        return across.args[0]  # type: ignore[return-value]
    if across.target in RESHAPES and isinstance(across.args[0], Node) and _permutes(across.args[0], (2, 0, 1)):
        rows: Node = across.args[0].args[0]  # type: ignore[assignment]
        batch, tokens, channels = sizes(rows)
        return rows if sizes(across) == [channels, batch * tokens] else None
    return None


def convolve_rows(node: Node) -> None:
    """A convolution of each channel by itself, with zeros before the first token: `causal_conv1d`.

    Either it has them at both ends, and is cut to the length that came in; or they are put before the tokens first.
    """
    names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    if node.target is not torch.conv1d or any(name not in given for name in names):
        return
    x, weight = given["x"], given["weight"]
    if value_of(node).dtype != value_of(x).dtype:  # under autocast
        return
    if len(sizes(x)) != 3:
        return
    channels, width = sizes(x)[1], sizes(weight)[2]
    steps = [item[0] if isinstance(item, list | tuple) else item for item in (given[name] for name in names[3:6])]
    if width > MAX_WIDTH or given["groups"] != channels or sizes(weight)[:2] != [channels, 1]:
        return
    if steps == [1, width - 1, 1]:
        found = _cut(node, x)
    else:
        found = _behind_zeros(node, x, width - 1) if steps == [1, 0, 1] else None
    if found is None:
        return
    source, rows_in, result, rows_out = found
    after = _only_user(result)
    activated = after is not None and after.target is F.silu
    last = after if activated else result
    assert last is not None
    if not may_move(node, last, source, *node.all_input_nodes):
        return
    rows = source if rows_in else insert_traced(last, "transpose", source, 1, 2)
    new = insert_traced(last, OPS.causal_conv1d, rows, insert_traced(last, "squeeze", weight, 1), given["bias"], activated)
    replace(last, new if rows_out else insert_traced(last, "transpose", new, 1, 2))


def _cut(node: Node, x: Node) -> tuple[Node, bool, Node, bool] | None:
    """What a convolution reads and what is left of it once it is cut to that length, and which of the two has rows."""
    cut = _only_user(node)
    swapped = cut is not None and is_swap(cut)
    cut = _only_user(cut) if swapped else cut
    axis = 1 if swapped else 2
    is_cut = cut is not None and _keeps_front(cut, axis) and sizes(cut)[axis] == sizes(x)[2]
    return (x, False, cut, swapped) if cut is not None and is_cut else None


def _behind_zeros(node: Node, x: Node, amount: sympy.Expr) -> tuple[Node, bool, Node, bool] | None:
    """The same of a convolution of x, which is something behind so many zeros."""
    swapped = is_swap(x)
    padded: Any = x.args[0] if swapped else x
    axis = 1 if swapped else 2
    source = None
    if padded.target is PAD and len(padded.args) > 1:
        given = dict(zip(("x", "pad", "mode", "value"), padded.args, strict=False)) | padded.kwargs
        before = [*([0, 0] if swapped else []), amount, 0]
        if list(given["pad"]) == before and given.get("mode", "constant") == "constant" and not given.get("value"):
            source = given["x"]
    elif padded.target in CONCATENATIONS and len(padded.args) == 2 and padded.args[1] in (axis, axis - 3):
        zeros, *rest = padded.args[0]
        if zeros.target in ZEROS and sizes(zeros)[axis] == amount and len(rest) == 1:
            source = rest[0]
    if source is None or value_of(source).dtype != value_of(x).dtype or not may_move(padded, node, source):
        return None
    return source, swapped, node, False


def keep_window(node: Node) -> None:
    """``pad(x, (k - l, 0))`` of l tokens: the last k of them, with zeros in front where there are fewer."""
    if node.target is not PAD or node.kwargs or len(sizes(node)) != 3:
        return
    if list(node.args[2:]) not in ([], ["constant"], ["constant", None]):
        return
    x, amount = node.args[:2]
    if len(amount) != 2 or amount[1] != 0 or not isinstance(amount[0], Node):  # type: ignore[arg-type, index]
        return
    width = sizes(node)[2]  # the tokens and what is added
    if not width.is_Integer:
        return
    if is_swap(x) and not mode_changes(x, node):  # type: ignore[arg-type]
        window = insert_traced(node, OPS.last_tokens, x.args[0], int(width), 1)  # type: ignore[union-attr]
        replace(node, insert_traced(node, "transpose", window, 1, 2))
    else:
        replace(node, insert_traced(node, OPS.last_tokens, x, int(width), 2))


def split_rows(node: Node) -> None:
    """A split of the channels of ``x.transpose(1, 2)``: the pieces of x, each transposed."""
    if split_axis(node) != 1 or len(node.args) < 2:
        return
    across, sizes_or_count = node.args[:2]
    if not is_swap(across) or len(sizes(across)) != 3:  # type: ignore[arg-type]
        return
    if any(mode_changes(across, piece) for piece in node.users):  # type: ignore[arg-type]
        return
    rows = insert_traced(node, node.target, across.args[0], sizes_or_count, -1)  # type: ignore[arg-type, union-attr]
    for piece in list(node.users):
        replace(piece, insert_traced(piece, "transpose", insert_traced(piece, operator.getitem, rows, piece.args[1]), 1, 2))


# --- what nodes are ----------------------------------------------------------------------------------------------------


def _permutes(node: Node, order: tuple[int, ...]) -> bool:
    if node.target not in ("permute", torch.permute):
        return False
    given = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    return tuple(given) == order  # type: ignore[arg-type]


def _keeps_front(node: Node, axis: int) -> bool:
    """Whether it is ``x[:, ..., :n]`` along this of three axes, and all along the others."""
    if node.target in ("narrow", torch.narrow):
        return list(node.args[1:3]) in ([axis, 0], [axis - 3, 0]) and not node.kwargs
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = list(node.args[1])
    if index[0] is Ellipsis:
        index = [slice(None)] * (4 - len(index)) + index[1:]
    index += [slice(None)] * (3 - len(index))
    if len(index) != 3 or not all(isinstance(item, slice) and item.start is None and item.step is None for item in index):
        return False
    return all(item.stop is None for place, item in enumerate(index) if place != axis)


def _only_user(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None

"""Fuse what belongs together, on a graph of either kind; the rest goes to the inner compiler as it is."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from simba_compile.passes.attention import read_cache
from simba_compile.passes.edit import dtype_of, erase, insert, is_stale, is_swap, may_move, rank_of, replace, sizes
from simba_compile.passes.effects import is_inplace, shares_memory, written_between
from simba_compile.passes.length import value_of
from simba_compile.passes.match import ADDS
from simba_compile.passes.modes import mode_changes
from simba_compile.passes.norms import fuse_add_norm, fuse_gated_norm, fuse_norm, fuse_rounding
from simba_compile.passes.pieces import is_of_one_type, is_plain, linear_arguments, pieces_of
from simba_compile.passes.scans import SCANS
from simba_compile.passes.step import fix_sizes, fuse_ssd_step, fuse_step, log_of_minus, take_logarithm
from simba_compile.passes.tokens import CONCATENATIONS, LINEAR, POINTWISE, PRODUCTS, SPLITS, TO_TYPE, is_one_result, is_simba

OPS = torch.ops.simba
WIDENED = ("A", "A_log", "D", "dt_bias")  # what operators take in any type, as norms take their weights
UNFILLED: dict[Any, Any] = {torch.zeros: torch.empty, torch.zeros_like: torch.empty_like, "new_zeros": "new_empty"}
OUR_NORMS = {OPS.rms_norm, OPS.gated_norm, OPS.add_norm}


def lower(gm: GraphModule) -> None:
    """Run every rewrite over the graph, in place."""
    plainer = (drop_marks, drop_casts, drop_slices, untranspose_product, cancel_transposes, gather_first, project_kept)
    norms = (fuse_gated_norm, fuse_rounding, fuse_norm)
    fusions = (fuse_gather, fuse_residual, fuse_add_norm, fuse_linear)
    steps = (fix_sizes, take_logarithm, drop_widening, fuse_step, fuse_ssd_step, lay_out_rates)
    caches = (keep_result, leave_unfilled, copy_joined, read_cache)
    for rewrite in (*plainer, *norms, *fusions, *steps, *caches):
        for node in list(gm.graph.nodes):
            if node.op in ("call_function", "call_method"):
                rewrite(node)
    gm.graph.lint()
    gm.recompile()


def drop_marks(node: Node) -> None:
    """The marks around a mixture of experts: what they mark."""
    if node.target is OPS.leave_experts:
        replace(node, node.args[0])  # type: ignore[arg-type]
    elif node.target is OPS.enter_experts:
        for taken in list(node.users):
            replace(taken, node.args[0][taken.args[1]])  # type: ignore[index, arg-type]


def drop_casts(node: Node) -> None:
    """``x.to(dtype)`` where x has the dtype: x."""
    if node.target not in TO_TYPE or not isinstance(node.args[0], Node):
        return
    source, value, given = node.args[0], value_of(node), value_of(node.args[0])
    if dtype_of(node) is None or dtype_of(source) != dtype_of(node) or given.device != value.device:
        return
    if node.kwargs.get("copy") or node.kwargs.get("memory_format") or len(node.args) > 2:
        return
    node.replace_all_uses_with(source)
    erase(node)


def drop_slices(node: Node) -> None:
    """``x[..., -n:]`` of n tokens, which takes all of them: x."""
    if node.target is not operator.getitem or not sizes(node) or sizes(node) != sizes(node.args[0]):
        return
    x: Node = node.args[0]  # type: ignore[assignment]
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if _is_callers_own(x, node):
        return
    if all(item is Ellipsis or isinstance(item, slice) for item in items) and not mode_changes(x, node):
        node.replace_all_uses_with(x)
        erase(node)


def _is_callers_own(x: Node, view: Node) -> bool:
    """Whether the caller's own tensor would be returned, where a view of it is."""
    return x.op in ("placeholder", "get_attr") and view.graph.output_node() in view.users


def drop_widening(node: Node) -> None:
    """``bias.float()`` of a bias in half precision, given to an operator that widens it by itself: the bias.

    On a GPU each is a launch of its own, in every layer.
    """
    if not is_simba(node):
        return
    for i, argument in enumerate(node.target.default._schema.arguments[: len(node.args)]):  # type: ignore[union-attr]
        cast = node.args[i]
        takes = argument.name in WIDENED or (argument.name == "weight" and node.target in OUR_NORMS)
        if not takes or not isinstance(cast, Node) or cast.target not in TO_TYPE:
            continue
        bias: Node = cast.args[0]  # type: ignore[assignment]
        widens = dtype_of(cast) == torch.float32 and dtype_of(bias) in (torch.bfloat16, torch.float16)
        if widens and value_of(bias).device == value_of(cast).device and may_move(cast, node, bias):
            node.update_arg(i, bias)
            erase(cast)


def rates(A_log: torch.Tensor) -> torch.Tensor:
    """``-exp(A_log)``, (channel, state) in float32, with neighbouring channels in neighbouring places of memory."""
    across = A_log.t()
    return -A_log.new_empty(across.shape, dtype=torch.float32).copy_(across).exp().t()


def lay_out_rates(node: Node) -> None:
    """``A = -exp(A_log)``, which only a GPU's score and scan read: laid out for them once, and not by each."""
    A_log = log_of_minus(node)
    if A_log is None or _is_on_cpu(node):
        return
    if any(reader.target not in {OPS.influence, OPS.selective_scan} for reader in node.users):
        return
    if rank_of(node) != 2 or {dtype_of(node), dtype_of(A_log)} != {torch.float32}:
        return
    if A_log.target in TO_TYPE and dtype_of(A_log.args[0]) in (torch.bfloat16, torch.float16):
        A_log = A_log.args[0]  # type: ignore[assignment]
    if value_of(A_log).device == value_of(node).device and not is_stale(node.args[0], node, A_log):  # type: ignore[arg-type]
        replace(node, insert(node, rates, A_log))


def keep_result(node: Node) -> None:
    """``zeros(...).copy_(state)``, as caches keep their first states, of what a scan or `last_tokens` made: the state."""
    made, result = _written_over(node)
    if made is None or result is None or node.kwargs or not value_of(made).is_contiguous():
        return
    source = result.args[0] if is_one_result(result) else result
    if not isinstance(source, Node) or source.target not in {*SCANS, OPS.last_tokens} or {*result.users} - {made, node}:
        return
    alike = sizes(made) == sizes(result) and dtype_of(made) == dtype_of(result)
    if alike and value_of(made).device == value_of(result).device and not mode_changes(source, node):
        for copy in (node, made):
            copy.replace_all_uses_with(result)
            node.graph.erase_node(copy)


def leave_unfilled(node: Node) -> None:
    """``zeros(...).copy_(x)``: no zeros, for x is written over all of them."""
    made, _ = _written_over(node)
    if made is not None:
        made.target = UNFILLED[made.target]


def copy_joined(node: Node) -> None:
    """``cat([empty, x], dim)``, as a cache takes its first keys: a copy of x, laid out as what `cat` makes.

    Inductor would lay it out as x is, and what reads it (a step) would be compiled for that, and then for what it adds to.
    """
    parts = node.args[0] if node.target in CONCATENATIONS and node.target is not torch.stack else None
    if not isinstance(parts, list | tuple):
        return
    full = [part for part in parts if 0 not in sizes(part)]
    if len(full) != 1 or len(parts) == 1 or sizes(full[0]) != sizes(node) or dtype_of(full[0]) != dtype_of(node):
        return
    copied = insert(node, "clone", full[0])
    copied.kwargs = {"memory_format": torch.contiguous_format}
    replace(node, copied)


def _written_over(node: Node) -> tuple[Node | None, Node | None]:
    """The zeros of ``zeros(...).copy_(x)``, which nothing reads before, and x where it is a node; else neither."""
    made, source = node.args[:2] if node.target == "copy_" and len(node.args) > 1 else (None, None)
    if not isinstance(made, Node) or made.target not in UNFILLED or made.kwargs.get("out") is not None:
        return None, None
    if node is not min(made.users) or source is made:
        return None, None
    return made, source if isinstance(source, Node) else None


def untranspose_product(node: Node) -> None:
    """``W @ x.transpose(1, 2)`` of rows x: ``linear(x, W).transpose(1, 2)``, which leaves the channels last."""
    if node.target not in PRODUCTS or len(node.args) != 2:
        return
    weight, across = node.args
    if not isinstance(weight, Node) or not isinstance(across, Node) or not is_swap(across):
        return
    if rank_of(weight) != 2 or rank_of(across) != 3 or mode_changes(across, node):
        return
    rows = insert(node, torch.nn.functional.linear, across.args[0], weight)
    rows.meta["example_value"] = value_of(node).transpose(1, 2)
    replace(node, insert(node, "transpose", rows, 1, 2))


def cancel_transposes(node: Node) -> None:
    """``x.transpose(1, 2).transpose(1, 2)``, made contiguous in between or not: x."""
    if not is_swap(node):
        return
    inner: Node = node.args[0]  # type: ignore[assignment]
    while inner.target == "contiguous":
        inner = inner.args[0]  # type: ignore[assignment]
    if not is_swap(inner) or mode_changes(inner, node):
        return
    x: Node = inner.args[0]  # type: ignore[assignment]
    is_copied, output = inner is not node.args[0], node.graph.output_node()
    if is_copied and written_between(inner, output, x, node):
        return  # the copy is there because x changes, or the copy itself
    if is_copied and any(shares_memory(node, returned) for returned in output.all_input_nodes):
        return  # the caller gets the copy, and may write into it
    if _is_callers_own(x, node):
        return
    node.replace_all_uses_with(x)
    erase(node)


def gather_first(node: Node) -> None:
    """``gather(silu(z))``, where nothing else reads ``silu(z)``: ``silu(gather(z))``, on fewer tokens."""
    while node.target is OPS.gather and node.args[0].target in POINTWISE:  # type: ignore[union-attr]
        applied: Node = node.args[0]  # type: ignore[assignment]
        (read, *others) = applied.all_input_nodes
        if others or len(applied.users) != 1 or sizes(read) != sizes(applied) or is_inplace(applied):
            return
        if not may_move(applied, node, read, node.args[1]):  # type: ignore[arg-type]
            return
        gathered = insert(node, OPS.gather, read, *node.args[1:])
        gathered.meta = dict(read.meta)
        after = node.graph.node_copy(applied, lambda source, g=gathered: g)  # type: ignore[misc]
        gathered.append(after)
        replace(node, after)
        node = gathered


def project_kept(node: Node) -> None:
    """The gate, a piece of ``linear(x, W)`` that is only gathered: ``linear(gather(x), W[a:b])``, for the tokens that stay.

    The other pieces come from the other rows of W.
    """
    if node.target is not OPS.gather or node.args[2] != 1 or node.args[0].target is not operator.getitem:  # type: ignore
        return
    split: Node = node.args[0].args[0]  # type: ignore[assignment, union-attr]
    projection = split.args[0] if split.target in SPLITS else None
    if not isinstance(projection, Node) or projection.target not in LINEAR or rank_of(projection) != 3:
        return
    if not is_plain(projection) or not _has_rows(projection):
        return
    pieces = pieces_of(projection)
    gate = next((piece for piece in pieces if piece.node is node.args[0]), None)
    if gate is None or len(gate.node.users) != 1 or not may_move(projection, node, *projection.all_input_nodes):
        return
    x: Node = projection.args[0]  # type: ignore[assignment]

    gathered = insert(node, OPS.gather, x, *node.args[1:])
    gathered.meta = dict(x.meta)
    place = pieces.index(gate)
    for run in (pieces[:place], pieces[place + 1 :]):  # its neighbours on either side stay one product
        if not run:
            continue
        made = _project(projection, x, run[0].first, run[-1].last, split)
        if len(run) == 1:
            replace(run[0].node, made)
            continue
        parts = insert(split, torch.split, made, [piece.last - piece.first for piece in run], -1)
        parts.meta = {"example_value": tuple(value_of(piece.node) for piece in run)}
        for i, piece in enumerate(run):
            replace(piece.node, insert(split, operator.getitem, parts, i))
    replace(node, _project(projection, gathered, gate.first, gate.last, node))


def _project(projection: Node, x: Node, first: int, last: int, before: Node) -> Node:
    """Channels ``first`` to ``last`` of a projection, of x, by the rows of the weight that make them."""
    rows: list[Node | None] = []
    for value in linear_arguments(projection)[1:]:
        part = None if value is None else insert(before, operator.getitem, value, slice(first, last))
        if part is not None:
            part.meta = {"example_value": value_of(value)[first:last]}
        rows.append(part)
    new = insert(before, projection.target, x, *rows)
    new.meta = {**projection.meta, "example_value": value_of(projection)[..., first:last]}
    return new


def fuse_gather(node: Node) -> None:
    """A scan of gathered tokens: a scan with an index, which gathers as it loads."""
    if node.target not in SCANS:
        return
    kind = SCANS[node.target]  # type: ignore[index]
    args = kind.named(node.args)
    gathers = [args[name] for name in kind.along_tokens]
    if not all(isinstance(g, Node) and g.target is OPS.gather and g.args[2] == 1 for g in gathers):
        return
    if len({g.args[1] for g in gathers}) != 1:  # type: ignore[union-attr]
        return
    if any(is_stale(g, node, *g.all_input_nodes) for g in gathers):  # type: ignore[arg-type, union-attr]
        return
    args |= {name: args[name].args[0] for name in kind.along_tokens}  # type: ignore[union-attr]
    args["index"] = gathers[0].args[1]  # type: ignore[union-attr]
    node.args = tuple(args.values())
    erase(*gathers)  # type: ignore[arg-type]


def linear_onto(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, fresh: bool) -> torch.Tensor:
    """``residual + linear(x, weight)``, summed up by the matrix product itself.

    `fresh`: nobody else reads `residual`, which is then overwritten.
    """
    rows = residual.flatten(0, 1)
    product = torch.Tensor.addmm_ if fresh else torch.addmm
    return product(rows, x.flatten(0, 1), weight.t()).view(residual.shape)


def fuse_residual(node: Node) -> None:
    """``residual + linear(x, weight)``: one product, `simba::linear` where it may be ours, else `linear_onto`."""
    if node.target not in ADDS or len(node.args) != 2 or node.kwargs:
        return
    for residual, product in (node.args, reversed(node.args)):
        if not isinstance(residual, Node) or not isinstance(product, Node) or product.target not in LINEAR:
            continue
        x, weight, bias = linear_arguments(product)
        if sizes(residual) != sizes(product) or dtype_of(residual) != dtype_of(product):  # one is broadcast or widened
            continue
        if bias is not None or len(product.users) != 1 or rank_of(product) != 3 or not is_of_one_type(product):
            continue
        if not may_move(product, node, *product.all_input_nodes):
            continue
        gathered = residual.target is OPS.gather and len(residual.users) == 1
        if not _is_ours(product):
            replace(node, insert(node, linear_onto, residual, x, weight, gathered))
        elif gathered and residual.args[2] == 1 and may_move(residual, node, *residual.args[:2]):  # type: ignore[arg-type]
            replace(node, insert(node, OPS.linear, x, weight, None, *residual.args[:2]))
        else:
            replace(node, insert(node, OPS.linear, x, weight, None, residual, None))
        return


def fuse_linear(node: Node) -> None:
    """``linear(x, weight, bias)`` on the CPU: `simba::linear`."""
    if node.target in LINEAR and _is_ours(node):
        replace(node, insert(node, OPS.linear, *linear_arguments(node), None, None))


def _is_ours(product: Node) -> bool:
    """Whether our own product may run a linear layer: on the CPU, all in one type."""
    return _has_rows(product) and is_of_one_type(product) and all(map(_is_on_cpu, product.all_input_nodes))


def _is_on_cpu(node: Node) -> bool:
    return value_of(node).device.type == "cpu"


def _has_rows(product: Node) -> bool:
    """Whether each channel that a linear layer gives has a row of the weight, and a bias of its own if there is one."""
    _, weight, bias = linear_arguments(product)
    return rank_of(weight) == 2 and (bias is None or sizes(bias) == sizes(weight)[:1])

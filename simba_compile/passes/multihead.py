"""Write PyTorch's modules of attention as what they compute, so that attention of tokens runs on those that are kept.

`nn.MultiheadAttention`       →  linear layers around ``scaled_dot_product_attention``
`nn.TransformerEncoderLayer`  →  the same, norms and a feed-forward part, where in inference it is one operation
"""

import functools
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from simba_compile.passes.attention import are_of_others
from simba_compile.passes.edit import called, dtype_of, erase, insert_traced, rank_of, sizes
from simba_compile.passes.length import NO_TOKENS, Length, value_of

_MODULE = inspect.signature(F.multi_head_attention_forward)
_LAYER = [argument.name for argument in torch.ops.aten._transformer_encoder_layer_fwd.default._schema.arguments]
_UNUSUAL = ("bias_k", "bias_v", "add_zero_attn", "use_separate_proj_weight", "static_k", "static_v")
_OF_KEYS = 1  # the type of an encoder layer's mask that is (batch, key); others are (..., query, key)


def write_out(graph: Graph, length: Length) -> None:
    """Run over a graph, in place."""
    for node in list(graph.nodes):
        if node.target is F.multi_head_attention_forward:
            _write_module(node, length)
        elif node.target is torch._transformer_encoder_layer_fwd:
            _write_layer(node, length)


def _write_module(node: Node, length: Length) -> None:
    """An attention module's call with tokens in axis 0, to tokens or to something else, if nothing reads its weights."""
    bound = _MODULE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    parts = [given[name] for name in ("query", "key", "value")]
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if any(rank_of(part) != 3 for part in parts) or not _has_tokens(parts[0], 0, length):
        return
    is_to_others = are_of_others(parts[1:], length) and length.of(mask) == NO_TOKENS
    if not is_to_others and not all(_has_tokens(part, 0, length) for part in parts[1:]):
        return
    if any(given[name] for name in _UNUSUAL) or any(read.args[1] != 0 for read in node.users):
        return
    if not all(added is None or (rank_of(added) == 2 and value_of(added).is_floating_point()) for added in (mask, padding)):
        return
    if called(F.linear, (parts[0], given["out_proj_weight"])).dtype != value_of(node)[0].dtype:  # within an autocast
        return
    call = functools.partial(insert_traced, node)
    weight, bias, heads = given["in_proj_weight"], given["in_proj_bias"], given["num_heads"]
    rows = [call("transpose", part, 0, 1) for part in dict.fromkeys(parts)]
    if len(rows) == 1:
        projected = _thirds(node, call(F.linear, rows[0], weight, bias), -1)
    else:
        of_part = dict(zip(dict.fromkeys(parts), rows, strict=True))
        biases = [None] * 3 if bias is None else _thirds(node, bias, 0)
        weights = _thirds(node, weight, 0)
        projected = [call(F.linear, of_part[part], *each) for part, *each in zip(parts, weights, biases, strict=True)]
    is_causal = given["is_causal"] and padding is None and not given["need_weights"]
    mask = None if is_causal else mask
    if padding is not None:
        columns = call(operator.getitem, padding, (slice(None), None, None))
        mask = columns if mask is None else call(operator.add, mask, columns)
    dropped = given["dropout_p"] if given["training"] else 0.0
    attended = _attend(node, projected, heads, mask, dropped, is_causal)
    result = call(F.linear, attended, given["out_proj_weight"], given["out_proj_bias"])
    for read in list(node.users):  # in place: a mixer may be known to add onto it
        read.op, read.target, read.args = "call_method", "transpose", (result, 0, 1)
    erase(node)


def _write_layer(node: Node, length: Length) -> None:
    """An encoder layer's call on (batch, token, channel)."""
    given: dict[str, Any] = {"mask": None, "mask_type": None}
    given |= dict(zip(_LAYER, node.args, strict=False)) | node.kwargs
    x: Any = given["src"]
    if rank_of(x) != 3 or not _has_tokens(x, 1, length) or dtype_of(node) != dtype_of(x):  # within an autocast
        return
    call = functools.partial(insert_traced, node)
    mask = given["mask"]
    if mask is not None:
        gone = call("to", mask, torch.bool)  # whatever number says so
        mask = call("masked_fill", call("to", mask, dtype_of(x)), gone, -torch.inf)
        mask = call(operator.getitem, mask, (slice(None), None, None)) if given["mask_type"] == _OF_KEYS else mask

    def norm(x: Node, which: int) -> tuple[Any, ...]:
        sizes = (value_of(x).shape[-1],)
        return F.layer_norm, x, sizes, given[f"norm_weight_{which}"], given[f"norm_bias_{which}"], given["eps"]

    def attention(x: Node) -> Node:
        projected = _thirds(node, call(F.linear, x, given["qkv_weight"], given["qkv_bias"]), -1)
        attended = _attend(node, projected, given["num_heads"], mask, 0.0, False)
        return call(F.linear, attended, given["proj_weight"], given["proj_bias"])

    def feed_forward(x: Node) -> Node:
        wide = call(F.linear, x, given["ffn_weight_1"], given["ffn_bias_1"])
        wide = call(F.gelu if given["use_gelu"] else F.relu, wide)
        return call(F.linear, wide, given["ffn_weight_2"], given["ffn_bias_2"])

    if given["norm_first"]:
        x = call(operator.add, x, attention(call(*norm(x, 1))))
        last: tuple[Any, ...] = (operator.add, x, feed_forward(call(*norm(x, 2))))
    else:
        x = call(*norm(call(operator.add, x, attention(x)), 1))
        last = norm(call(operator.add, x, feed_forward(x)), 2)
    node.target, node.args, node.kwargs = last[0], last[1:], {}  # in place: a mixer may be known to add onto it


def _has_tokens(node: Any, axis: int, length: Length) -> bool:
    """Whether a value has its tokens in axis 0 or 1, and its sequences in the other."""
    places = sizes(node)  # of one sequence alone, as Length's axes could not tell
    return places[axis] == length.tokens and places[1 - axis] == length.batch and not length.depends(value_of(node).shape[2])


def _thirds(before: Node, whole: Any, dim: int) -> list[Node]:
    """The parts of queries, keys and values."""
    parts = insert_traced(before, "chunk", whole, 3, dim)
    return [insert_traced(before, operator.getitem, parts, which) for which in range(3)]


def _attend(before: Node, projected: list[Node], heads: int, mask: Any, dropped: float, is_causal: bool) -> Node:
    """Attention of heads, to what they give side by side."""
    call = functools.partial(insert_traced, before)
    apart = [call("transpose", call("unflatten", part, -1, (heads, -1)), 1, 2) for part in projected]
    attended = call(F.scaled_dot_product_attention, *apart, mask, dropped, is_causal)
    return call("flatten", call("transpose", attended, 1, 2), 2)

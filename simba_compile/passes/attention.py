"""Attention on kept tokens, and a cache that fewer tokens have entered.

Attention between mixers runs on the tokens that are left: their queries, keys and values, with the rows and columns of the
mask that belong to them.

A cache of attention keeps an entry for each token, pruned ones included, because Hugging Face takes positions and the sizes
of masks from its length. The entries of pruned tokens carry a mark (`simba::cache_entries`), and `read_cache` has attention
that reads a cache pass over them. Eager attention, which does not know the mark, gives NaN, not a wrong result.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from simba_compile.kernels.reference import is_marked
from simba_compile.passes.length import NO_TOKENS, Length, value_of
from simba_compile.passes.tokens import CASTS, CONCATENATIONS, REPEATS, SAME_MEMORY, is_one_result
from simba_compile.passes.walk import reached

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
COPIES: set[Any] = {"detach", torch.detach, "index_select", torch.index_select, "repeat_interleave", torch.repeat_interleave}
SAME_DATA: set[Any] = {*SAME_MEMORY, *CASTS, *CONCATENATIONS, *REPEATS, *COPIES}


def is_attention(node: Node) -> bool:
    """Whether it is PyTorch's attention."""
    return node.target is F.scaled_dot_product_attention


def _arguments(node: Node) -> dict[str, Any]:
    return {**dict(zip(NAMES, node.args, strict=False)), **node.kwargs}


def query_and_mask(node: Node) -> tuple[Any, Any]:
    """An attention's queries, and its mask or None."""
    arguments = _arguments(node)
    return arguments["query"], arguments.get("attn_mask")


def why_not(node: Node, length: Length) -> str | None:
    """Why an attention cannot run on kept tokens, where it cannot."""
    arguments = _arguments(node)
    for name in ("query", "key", "value"):
        value = value_of(arguments[name])
        if length.axis(value) != value.dim() - 2 or length.batch_axis(value) != 0:
            return f"the {name} of attention does not have one row for each token: it is {list(value.shape)}"
    if any(length.of(part) == NO_TOKENS and 0 not in value_of(part).shape for part in _parts(node, length)):
        return "attention reads its keys from a cache of a fixed size"
    mask = value_of(arguments.get("attn_mask"))
    if mask is None:
        return None
    for_all = mask.dim() < value_of(arguments["query"]).dim() or length.is_shared(mask)
    if (for_all or length.batch_axis(mask) == 0) and (length.is_square(mask) or length.axis(mask) == mask.dim() - 1):
        return None
    return f"the mask of attention is {list(mask.shape)}"


def reads_others(node: Node, length: Length) -> bool:
    """Whether an attention's queries alone have tokens, so that each of them is by itself."""
    arguments = _arguments(node)
    query, mask = value_of(arguments["query"]), arguments.get("attn_mask")
    has_rows = length.axis(query) == query.dim() - 2 and length.batch_axis(query) == 0 and not arguments.get("is_causal")
    return has_rows and length.of(mask) == NO_TOKENS and are_of_others([arguments["key"], arguments["value"]], length)


def are_of_others(values: list[Node], length: Length) -> bool:
    """Whether values are made of something else than tokens, as an encoder's states are; a static cache is not."""
    made = reached(values, lambda part: (source for source in part.all_input_nodes if isinstance(value_of(source), Tensor)))
    return all(length.of(value) == NO_TOKENS for value in made)


def entries(node: Node, length: Length) -> set[Node]:
    """An attention's keys and values, and what they are copies of: those that the graph returns go into a cache."""
    return {source for source in _parts(node, length) if length.of(source) >= 0}


def _parts(node: Node, length: Length) -> set[Node]:
    """An attention's keys and values, and the tensors that they are copies of or were put together from."""

    def sources(part: Node) -> list[Node]:
        return copied(part) if length.of(part) >= 0 and not is_one_result(part) else []

    arguments = _arguments(node)
    parts: set[Node] = set()
    more = [arguments["key"], arguments["value"]]
    while more:
        parts.update(reached(more, sources))
        splits: set[Any] = {part.args[0] for part in parts if is_one_result(part)}
        splits = {split for split in splits if parts.issuperset(split.users)}  # into nothing but keys and values
        more = [whole for split in splits for whole in copied(split) if whole not in parts]
    return parts


def copied(node: Node) -> list[Node]:
    """What a node shows the numbers of, as they are; nothing where it computes."""
    if node.target not in SAME_DATA:
        return []
    sources = node.all_input_nodes if node.target in CONCATENATIONS else node.args[:1]
    return [source for source in sources if isinstance(source, Node)]


# --- reading a cache -------------------------------------------------------------------------------------------------


def read_cache(node: Node) -> None:
    """Attention whose keys come from an input of the graph: `attention_over_cache`."""
    if is_attention(node) and may_be_cached(_arguments(node)["key"]):
        node.target = attention_over_cache


def may_be_cached(key: Node) -> bool:
    """Whether keys of attention come from an input of the graph."""
    return value_of(key).dim() in (3, 4) and any(
        source.op == "placeholder" and isinstance(value_of(source), Tensor) for source in reached([key], copied)
    )


def attention_over_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, to the entries that are not marked as pruned.

    Parameters
    ----------
    query, key, value : Tensor
        (batch, head, token, channel), or without heads. Marks are the same for all heads.
    attn_mask, dropout_p, is_causal, **kwargs
        See PyTorch's function.
    """
    if key.dim() == 3:
        query, key, value = (rows.unsqueeze(1) for rows in (query, key, value))
        mask = None if attn_mask is None else attn_mask.unsqueeze(-3)
        return attention_over_cache(query, key, value, mask, dropout_p, is_causal, **kwargs).squeeze(1)
    pruned = is_marked(key[:, 0, :, 0])
    if key.device.type == "cpu" and not torch.compiler.is_compiling():  # what follows would wait for a GPU
        if not pruned.any():
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        counts = (~pruned).sum(1)
        if bool((counts == counts[0]).all()) and not is_causal:  # each sequence keeps as many: read those alone
            left = pruned.logical_not().nonzero()[:, 1].view(len(pruned), -1)
            rows = left[:, None, :, None]
            key, value = (x.gather(2, rows.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
            if attn_mask is not None:
                attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
                mask = attn_mask.expand(len(left), *attn_mask.shape[1:])
                columns = left[:, None, None, :].expand(-1, *mask.shape[1:3], -1)
                attn_mask = mask.gather(3, columns)
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
    return _attention_past(pruned, query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


def without_pruned(scores: Tensor, key: Tensor) -> Tensor:
    """Scores of attention, (..., query, key), with those of entries that are marked as pruned at -inf."""
    pruned = is_marked(key[..., 0] if key.dim() == 3 else key[:, :1, :, 0])
    return scores.masked_fill(pruned.unsqueeze(-2), -torch.inf)


def _attention_past(
    pruned: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    **kwargs: Any,
) -> Tensor:
    """Attention with the entries that are `pruned`, (batch, token), masked: nothing depends on how many there are."""
    gone = pruned[:, None, :, None]
    key, value = (x.masked_fill(gone, 0) for x in (key, value))
    seen = ~pruned[:, None, None, :]
    if is_causal:
        seen = seen & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    if attn_mask is None or attn_mask.dtype == torch.bool:
        attn_mask = seen if attn_mask is None else attn_mask & seen
    else:
        attn_mask = attn_mask.masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)

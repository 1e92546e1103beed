"""The length becomes symbolic while Dynamo traces.

Dynamo's first graph has the length as a literal. When a substitute of `capture` first meets our backend, this file tells
Dynamo's record of varying sizes what a second call with another length would tell it, and has Dynamo start over. Where the
model makes its sequence of its inputs (a class token before them), no input has the length: then their second axes vary.
What runs on a cache of attention is told that it grows, which Dynamo would find out by compiling the second step anew.
The record is put back once the graph is there (`forget`), so that other backends do not see it.
"""

import copy
import dataclasses
import functools
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo import config, exc, pgo
from torch._dynamo.callback import callback_handler
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import Graph
from torch.fx.experimental import _config as shapes
from transformers.cache_utils import Cache, DynamicLayer

from simba_compile.passes.length import traced, value_of
from simba_compile.passes.scans import MIXER_OPERATORS

CACHED = (0, 2)  # the axes of cached keys and values that vary: sequences and tokens

_undo: list[Callable[[], None]] = []  # what `forget` calls


@torch._dynamo.assume_constant_result
def make_length_dynamic() -> None:
    """Have Dynamo trace anew with symbolic batch, length and number of cached keys, unless they are (or cannot be)."""
    tx = InstructionTranslator.current_tx().output.root_tx
    if not config.automatic_dynamic_shapes or tx is None:
        return
    batch, length = _traced_sizes(tx.output.graph)
    sizes = [traced(batch), traced(length)]
    inputs = {
        name: value
        for name, value in _tensors(tx).items()
        # Of one axis: a number for each sequence, as labels are, or for each token. If static, it would fix others' sizes.
        if value.dim() >= 2 or (value.dim() == 1 and value.shape[0] in sizes)
    }
    for name, value in inputs.items():  # Dynamo looks at some behind the mixers only: `forget` would put back no record
        pgo.update_automatic_dynamic(tx, name, pgo.FrameStateSizeEntry.make_size(tuple(value.shape)))
    cached = _keys_and_values(tx)
    lengths = {sizes[1], *(value.shape[2] + sizes[1] for value in cached.values())}  # of masks, the longer ones
    changed = _mark(tx, cached, lambda axis, size: axis in CACHED)
    changed |= _mark(tx, inputs, lambda axis, size: axis == 0 or size in lengths)
    if not changed and isinstance(length, int) and length > 1:  # made of other sizes, as with a class token before the rest
        changed = _mark(tx, inputs, lambda axis, size: axis < 2)
    if changed:
        _start_over(tx, "simba: the length is made symbolic")


@torch._dynamo.assume_constant_result
def make_cache_dynamic() -> None:
    """Have Dynamo trace a decoding step anew with a symbolic number of cached keys: each step has one more."""
    tx = InstructionTranslator.current_tx().output.root_tx
    if not config.automatic_dynamic_shapes or tx is None:
        return
    cached = _keys_and_values(tx)
    lengths = {value.shape[2] + 1 for value in cached.values()}  # of masks
    changed = _mark(tx, cached, lambda axis, size: axis in CACHED)
    changed |= _mark(tx, _tensors(tx), lambda axis, size: axis > 0 and size in lengths)
    if changed:
        _start_over(tx, "simba: the number of cached keys is made symbolic")


def _start_over(tx: Any, reason: str) -> None:
    if forget not in callback_handler.end_callbacks:  # `torch._dynamo.reset` takes it away
        callback_handler.register_end_callback(forget)  # where the trace fails, our backend is not called
    tx.speculation_log.clear()  # sizes that are symbols now are operations of the graph: breaks are judged anew
    raise exc.RestartAnalysis(restart_reason=reason)


def _traced_sizes(graph: Graph) -> tuple[Any, Any]:
    """Batch and tokens of the convolution or scan that was traced last: an input of the model may be anything."""
    value = value_of(next(node for node in reversed(graph.nodes) if node.target in MIXER_OPERATORS))
    return (value[0] if isinstance(value, list | tuple) else value).shape[:2]


def _mark(tx: Any, inputs: Mapping[str, torch.Tensor], varies: Callable[[int, int], bool]) -> bool:
    """Tell Dynamo's record of the inputs' axes that vary, by number and size; whether that was news to it."""
    state = pgo.get_code_state()[_code_id(tx)].automatic_dynamic
    changed = False
    marked = set()  # sizes of axes behind the first
    for name, value in inputs.items():
        vary = [axis for axis, size in enumerate(value.shape) if size > 1 and varies(axis, size)]
        marked |= {value.shape[axis] for axis in vary if axis > 0}
        known = state.get(name)
        if all(known is not None and known.is_size_dynamic(axis) for axis in vary):
            continue
        _undo.append(functools.partial(_put_back, state, name, copy.copy(known)))
        size = tuple(pgo.auto_dynamic if axis in vary else int(have) for axis, have in enumerate(value.shape))
        pgo.update_automatic_dynamic(tx, name, pgo.FrameStateSizeEntry.make_size(size))  # type: ignore[arg-type]
        changed = True
    if shapes.use_duck_shape and any(v.dim() > 1 and v.shape[0] in marked for v in inputs.values()):
        # A batch as large as the length: Dynamo would take the two for one symbol.
        shapes.use_duck_shape = False
        _undo.append(functools.partial(setattr, shapes, "use_duck_shape", True))
        changed = True
    return changed


def _code_id(tx: Any) -> Any:
    try:
        return pgo.CodeId.make(tx.f_code, tx.closure)
    except TypeError:  # torch 2.11
        return pgo.CodeId.make(tx.f_code)


def _arguments(source: str, value: Any, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What a frame was called with, under the names that Dynamo gives it; of a container that is seen twice, the first."""
    items: list[tuple[str, Any]]
    seen = set() if seen is None else seen
    if isinstance(value, UserDict):  # such as what a tokenizer returns
        items = [(f"{source}.data", value.data)]
    elif isinstance(value, dict) and type(value) not in (dict, OrderedDict, defaultdict):  # such as what a model returns
        items = [
            (f"dict.__getitem__({source}, list(dict.keys({source}))[{i}])", item) for i, item in enumerate(value.values())
        ]
        names = [name for name in value if isinstance(name, str) and getattr(value, name, None) is value[name]]
        items += [(f"{source}.{name}", value[name]) for name in names]
    elif isinstance(value, dict):
        items = [(f"{source}[{key!r}]", item) for key, item in value.items()]
    elif type(value) in (list, tuple):
        items = [(f"{source}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f"{source}.{name}", getattr(value, name)) for name in value._fields]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f"{source}.{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    else:
        yield source, value
        return
    if id(value) not in seen:  # an object may be in itself
        seen.add(id(value))
        for name, item in items:
            yield from _arguments(name, item, seen)


def _tensors(tx: Any) -> dict[str, torch.Tensor]:
    """The tensors that the frame was called with; no parameters."""
    return {
        name: value
        for name, value in _arguments("L", tx.f_locals)
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    }


def _keys_and_values(tx: Any) -> dict[str, torch.Tensor]:
    """The keys and values of the caches that the frame was called with, where they grow with every token."""
    return {
        f"{source}.layers[{i}].{name}": getattr(layer, name)
        for source, cache in _arguments("L", tx.f_locals)
        if isinstance(cache, Cache)
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.dim() == 4  # else it is empty
        for name in ("keys", "values")
    }


def _put_back(state: dict[str, Any], name: str, entry: Any) -> None:
    if entry is None:
        state.pop(name, None)
    else:
        state[name] = entry


def forget(*_: Any) -> None:
    """Put back what `_mark` changed in Dynamo's records: before our backend, and when Dynamo is done."""
    while _undo:
        _undo.pop()()

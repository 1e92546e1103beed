"""What happens while Dynamo traces: scans become single nodes, and the length becomes symbolic.

This file reaches into Dynamo while it works, as `graph_breaks` and `recompile_limit` do after it; no other does.

*Lift.* Hugging Face and mamba_ssm keep the convolution and the scan of every Mamba-based model in module-level functions.
`torch.compiler.substitute_in_graph` makes Dynamo record one ``torch.ops.simba.*`` node for each call. The `substitutes` act
only where the backend that compiles is ours; for any other they run a copy of the original function, so that the graphs of
other backends stay as they were. Eager mode is not touched.

*A dynamic length.* Dynamo's first graph has the length as a literal. When a substitute first meets our backend, it tells
Dynamo's record of varying sizes what a second call with another length would tell it, and has Dynamo start over. Where the
model makes its sequence of its inputs (a class token before them), no input has the length: then their second axes vary.
What runs on a cache of attention is told that it grows, which Dynamo would find out by compiling the second step anew.
The record is put back once the graph is there (`forget`), so that other backends do not see it.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import logging
import sys
import types
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

from simba_compile import substitutes
from simba_compile.passes.length import traced, value_of
from simba_compile.passes.scans import MIXER_OPERATORS

log = logging.getLogger("simba_compile")

# Functions that are lifted, by family: transformers.models.<family>.modeling_<family>
_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_MAMBA1 = (*_CONV, "mamba_selective_scan", "mamba_selective_state_update")
_MAMBA2 = (*_CONV, "mamba2_chunk_scan", "mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined")
FAMILIES = {
    "mamba": (*_MAMBA1, "mamba_inner_fn"),
    "falcon_mamba": (*_MAMBA1, "mamba_inner_fn"),
    "jamba": (*_MAMBA1, "mamba_inner_fn"),
    "zamba": _MAMBA1,
    "mamba2": _MAMBA2,
    "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
    "nemotron_h": _MAMBA2,
    "zamba2": _MAMBA2,
}
CACHED = (0, 2)  # the axes of cached keys and values that vary: sequences and tokens
EXPERTS = ("grouped_mm_experts_forward", "batched_mm_experts_forward")  # of transformers.integrations.moe


class InvalidOptions(exc.ShortenTraceback, ValueError):
    """A `ValueError` that Dynamo hands to the caller as it is, without a wrapping of its own."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        """The message alone: Dynamo adds how to report a bug in PyTorch to its exceptions."""
        return self.message


# --- asked while tracing ---------------------------------------------------------------------------------------------

_backend: Callable | None = None
_undo: list[Callable[[], None]] = []  # what `forget` calls


def _unwrap(compiler_fn: Any) -> Any:
    """The function behind the wrappers that torch.compile puts around a backend."""
    for attribute in ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__"):
        inner = getattr(compiler_fn, attribute, None)
        if inner is not None and inner is not compiler_fn:
            return _unwrap(inner)
    return compiler_fn


@torch._dynamo.assume_constant_result
def _lifting() -> bool:
    """Whether the backend that Dynamo traces for is ours."""
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    splitter = getattr(compiler, "__self__", None)  # DistributedDataParallel's: it cuts the graph before we would see it
    if _unwrap(getattr(splitter, "backend_compile_fn", None)) is _backend:
        warn_once(
            "Under DistributedDataParallel the model stays dense, for Dynamo would cut its graph into pieces: set "
            "torch._dynamo.config.optimize_ddp = False before compiling."
        )
    return _unwrap(compiler) is _backend


@torch._dynamo.assume_constant_result
def _warn_of_declining(name: str) -> None:
    warn_once(
        f"{name} is called in a way that simba_compile has no kernel for (more than {substitutes.MAX_STATES} states, "
        "sequences packed into one row, or the like): it stays as it is, and its mixer counts as none."
    )


@functools.cache
def warn_once(message: str) -> None:
    """Warn of what many graphs have."""
    log.warning(message)


@torch._dynamo.assume_constant_result
def _make_length_dynamic() -> None:
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
def _make_cache_dynamic() -> None:
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


def with_own_code(function: Any) -> Callable:
    """The same function with a code object of its own: Dynamo keeps a limited number of compilations for each."""
    return _twin(function, function.__code__.replace())


def _twin(function: Any, code: types.CodeType) -> Callable:
    twin = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def forget(*_: Any) -> None:
    """Put back what `_mark` changed in Dynamo's records: before our backend, and when Dynamo is done."""
    while _undo:
        _undo.pop()()


# --- lifting ---------------------------------------------------------------------------------------------------------


def _lift(ours: Callable) -> Callable[[Callable], Callable]:
    """Put `ours` in a function's place where our backend compiles. A call that `ours` declines stays as it is."""

    def substitute_of(original: Callable) -> Callable:
        name = f"{original.__module__}.{original.__name__}"
        if not _has_the_parameters_of(original, ours):
            log.warning("%s has other parameters than this version of simba_compile knows: what calls it stays dense.", name)
            return original

        @functools.wraps(original)
        def substitute(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not _lifting():
                return original(*args, **kwargs)
            result = ours(*args, **kwargs)
            if result is NotImplemented:
                if ours in substitutes.SCANS:
                    _warn_of_declining(name)
                return original(*args, **kwargs)
            if of_a_prompt:
                _make_length_dynamic()
            elif of_a_step:
                _make_cache_dynamic()
            return result

        return substitute

    of_a_prompt, of_a_step = ours in substitutes.OF_A_PROMPT, ours in substitutes.OF_A_STEP
    return substitute_of


def _has_the_parameters_of(original: Callable, ours: Callable) -> bool:
    """Whether a substitute knows all that a function may be given, by place or name; else it would pass over some of it."""
    theirs, known = (list(inspect.signature(function).parameters.values()) for function in (original, ours))
    if any(each.kind is each.VAR_POSITIONAL for each in known):
        return True
    names = [each.name for each in known]
    placed = [each.name for each in theirs if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return placed == names[: len(placed)] and all(each.name in names for each in theirs if each.kind is each.KEYWORD_ONLY)


def _mark_experts(original: Callable) -> Callable:
    """Set marks around a mixture of experts, whose sorting and counting of rows the passes could not read otherwise."""

    def experts_forward(self, hidden_states, top_k_index, top_k_weights):  # type: ignore[no-untyped-def]
        if not _lifting():
            return original(self, hidden_states, top_k_index, top_k_weights)
        rows, index, weights = torch.ops.simba.enter_experts([hidden_states, top_k_index, top_k_weights])
        return torch.ops.simba.leave_experts(original(self, rows, index, weights))

    return experts_forward


LIFTS = {
    "causal_conv1d_fn": _lift(substitutes.causal_conv1d_fn),
    "causal_conv1d_update": _lift(substitutes.causal_conv1d_update),
    "mamba_inner_fn": _lift(substitutes.nothing),
    "mamba_selective_scan": _lift(substitutes.mamba_selective_scan),
    "mamba_selective_state_update": _lift(substitutes.mamba_selective_state_update),
    "mamba2_chunk_scan": _lift(substitutes.mamba2_chunk_scan),
    "mamba2_selective_state_update": _lift(substitutes.mamba2_selective_state_update),
    "mamba2_split_conv1d_scan_combined": _lift(substitutes.nothing),
}
_MAMBA_SSM = "mamba_ssm.ops"
PACKAGES = {  # of other packages, by the module that defines them; where they are not installed, there is nothing to lift
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": _lift(substitutes.packaged_conv1d_fn),
        "causal_conv1d_update": _lift(substitutes.packaged_conv1d_update),
    },
    f"{_MAMBA_SSM}.selective_scan_interface": {
        "selective_scan_fn": _lift(substitutes.selective_scan_fn),
        "mamba_inner_fn": _lift(substitutes.mamba_inner_fn),
    },
    f"{_MAMBA_SSM}.triton.selective_state_update": {
        "selective_state_update": _lift(substitutes.selective_state_update),
    },
    f"{_MAMBA_SSM}.triton.ssd_combined": {
        "mamba_chunk_scan_combined": _lift(substitutes.mamba_chunk_scan_combined),
        "mamba_split_conv1d_scan_combined": _lift(substitutes.mamba_split_conv1d_scan_combined),
    },
    f"{_MAMBA_SSM}.triton.layer_norm": {
        "layer_norm_fn": _lift(substitutes.layer_norm_fn),
        "rms_norm_fn": _lift(substitutes.rms_norm_fn),
    },
    f"{_MAMBA_SSM}.triton.layernorm_gated": {
        "rmsnorm_fn": _lift(substitutes.rmsnorm_fn),
    },
}


def _copy(function: types.FunctionType) -> Callable:
    """The same function under another identity, so that Dynamo traces into it instead of substituting again."""
    return functools.wraps(function)(_twin(function, function.__code__))


def install(backend: Callable) -> None:
    """Register the substitutes for every known family of the installed transformers, and for mamba_ssm if it is installed.

    Parameters
    ----------
    backend : callable
        Who they act for.
    """
    global _backend
    _backend = backend
    for family, functions in FAMILIES.items():
        lifts = {function: LIFTS[function] for function in functions}
        _substitute(f"transformers.models.{family}.modeling_{family}", lifts)
    _substitute("transformers.integrations.moe", dict.fromkeys(EXPERTS, _mark_experts))
    for module, lifts in PACKAGES.items():
        _substitute(module, lifts)


def _function_of(value: Any) -> types.FunctionType | None:
    """The function that a module's name stands for. Hugging Face's `kernels`, where installed, calls it from a module."""
    if isinstance(value, torch.nn.Module):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    return value if isinstance(value, types.FunctionType) else None


def _substitute(name: str, lifts: Mapping[str, Callable[[Callable], Callable]]) -> None:
    try:
        module = sys.modules.get(name) or importlib.import_module(name)
    except Exception as error:  # a package whose CUDA extension is missing or broken raises what it likes
        log.info("%s is not lifted: %s", name, error)
        return
    for function, lift in lifts.items():
        original = _function_of(getattr(module, function, None))
        if original is None:
            log.warning("%s has no function %s: models that use it stay dense.", name, function)
            continue
        substitute = torch.compiler.substitute_in_graph(original, skip_signature_check=True)
        substitute(lift(_copy(original)))  # type: ignore[arg-type]

"""What happens while Dynamo traces: scans become single nodes, and the length becomes symbolic (`symbolic_length`).

These two files reach into Dynamo while it works, as `graph_breaks` and `recompile_limit` do after it; no other does.

Hugging Face and mamba_ssm keep the convolution and the scan of every Mamba-based model in module-level functions.
`torch.compiler.substitute_in_graph` makes Dynamo record one ``torch.ops.simba.*`` node for each call. The `substitutes` act
only where the backend that compiles is ours; for any other they run a copy of the original function, so that the graphs of
other backends stay as they were. Eager mode is not touched.
"""

import functools
import importlib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dynamo import exc
from torch._dynamo.symbolic_convert import InstructionTranslator

from simba_compile import substitutes
from simba_compile.symbolic_length import make_cache_dynamic, make_length_dynamic

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


def with_own_code(function: Any) -> Callable:
    """The same function with a code object of its own: Dynamo keeps a limited number of compilations for each."""
    return _twin(function, function.__code__.replace())


def _twin(function: Any, code: types.CodeType) -> Callable:
    twin = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


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
                make_length_dynamic()
            elif of_a_step:
                make_cache_dynamic()
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

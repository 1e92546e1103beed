"""How an operator ``torch.ops.simba.*`` is registered, and what runs it on each device."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from simba_compile.kernels import reference
from simba_compile.kernels.native import binding, conv, linear, mixer, norm, scan, ssd, tokens

log = logging.getLogger("simba_compile")

LIBRARY = torch.library.Library("simba", "DEF")
GPU = "cuda"  # the device type of AMD's GPUs too
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = (tokens, scan, ssd, conv, linear, norm, mixer)
COPIES = ("select", "gather")  # whose Triton kernels take every dtype
FUNCTIONS: dict[Any, Callable] = {}  # by operator: what runs it on every device


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator ``simba::<its name>`` with this schema, on every device."""

    def register(function: Callable) -> Callable:
        LIBRARY.define(function.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
        packet = getattr(torch.ops.simba, function.__name__)
        packet.__doc__ = function.__doc__  # for help(torch.ops.simba.influence)
        FUNCTIONS[packet] = _counting_writes(function, packet.default)
        LIBRARY.impl(function.__name__, FUNCTIONS[packet], "CompositeExplicitAutograd")
        _open_to_inductor(function)
        return function

    return register


def places_written(operation: torch._ops.OpOverload) -> list[int]:
    """Which of its arguments an operator of ours writes into."""
    return [place for place, argument in enumerate(operation._schema.arguments) if argument.alias_info is not None]


def _counting_writes(function: Callable, operation: torch._ops.OpOverload) -> Callable:
    """The function; what it writes into counts that, so that autograd raises where it has saved the values before."""
    written = places_written(operation)
    if not written:
        return function

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        values = [args[place] for place in written]
        torch.autograd.graph.increment_version([value for value in values if not value.is_inference()])
        return result

    return run


def expect_pool(pool: str) -> None:
    """Raise ValueError for what is no pool of channels."""
    if pool not in reference.POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {', '.join(reference.POOLS)}.")


def fake(name: str) -> Callable[[Callable], Callable]:
    """The decorated function gives the operator's output shapes."""
    return torch.library.register_fake(f"simba::{name}", lib=LIBRARY)


@cache
def _triton_kernels() -> dict[str, Callable]:
    """The Triton kernels by operator, loaded when a tensor on a GPU first needs one; none without triton."""
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed: on the GPU plain torch runs in place of our kernels, many times slower.")
        return {}
    from simba_compile.kernels import gpu

    return gpu.KERNELS


def _on_gpu(name: str, tensors: list[Tensor]) -> Callable | None:
    """The Triton kernel for these tensors, if there is one. The first of them decides about the dtype.

    There is none for tensors of several GPUs: it would read at addresses of another one. Plain torch says what is wrong.
    """
    if not tensors or tensors[0].device.type != GPU or len({value.device for value in tensors}) != 1:
        return None
    if name not in COPIES and tensors[0].dtype not in GPU_DTYPES:
        return None
    return _triton_kernels().get(name)


def _open_to_inductor(function: Callable) -> None:
    """Make an operator show its Triton kernels while AOTAutograd traces, as `torch.library.triton_op` does."""
    name = function.__name__

    def trace(mode: Any, operation: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _on_gpu(name, [value for value in args if isinstance(value, Tensor)]) is None:
            return mode.__torch_dispatch__(operation, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    torch.library.register_torch_dispatch(f"simba::{name}", FunctionalTensorMode, trace, lib=LIBRARY)


@cache
def _native_module(name: str) -> ModuleType | None:
    """Where the operator's native kernel stands, if it has one."""
    return next((kernels for kernels in NATIVE if hasattr(kernels, name)), None)


def implementation(name: str, *tensors: Tensor | None) -> Callable:
    """What runs the operator `name` on these tensors: the Triton kernel, the native one, or its reference.

    A decoding step comes here a hundred times, so the way to a native kernel is short.
    """
    given = [value for value in tensors if value is not None]
    triton_kernel = _on_gpu(name, given)
    if triton_kernel is not None:
        return triton_kernel
    devices = {value.device for value in given}  # few, of many tensors
    if {device.type for device in devices} == {"cpu"} and binding.available():
        kernels = _native_module(name)
        if kernels is not None:
            return getattr(kernels, name)
    return by_torch(name)


@cache
def by_torch(name: str) -> Callable:
    """The operator's definition, with results as kernels give them and Inductor was told: contiguous, and views of nothing.

    Those of plain torch follow the inputs' layout; a view that comes out of an operator may not be written to in training.
    Autocast would compute products in another type, and keep copies of weights that know nothing of gradients.
    """
    definition = getattr(reference, name)

    @wraps(definition)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            result = definition(*args)
        return tuple(map(_by_itself, result)) if isinstance(result, tuple) else _by_itself(result)

    return run


def _by_itself(value: Tensor) -> Tensor:
    value = value.contiguous()
    return torch.ops.aten._unsafe_view(value, value.shape) if value._is_view() else value

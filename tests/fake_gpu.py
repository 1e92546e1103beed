"""Inductor and Triton on a GPU that is not there: ``python tests/fake_gpu.py mamba jamba`` (docs/testing.md).

Needs a torch that was built for CUDA, with its Triton. A tiny model of each family is compiled with mode="reduce-overhead"
on fake tensors: Inductor writes its code for an H200, Triton makes machine code of every kernel, and the code runs, but for
what a driver would do. So there are no numbers. What is checked: that a prompt and its decoding steps compile and run, that
kernels get the arguments and grids that they were compiled for, that the host waits for nothing, and what Inductor asks of
graphs that it records: inputs that it does not write into, or that stay where they are, and outputs that nothing reads once
they were overwritten. Much of torch is replaced for that, as it was in 2.11.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
import torch._subclasses.fake_tensor
import triton
from families import tiny_model
from torch import Tensor, nn
from torch._dynamo import utils
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.mutation_guard import GenerationTracker
from torch._dynamo.variables import builder
from torch._inductor import compile_fx, cudagraph_utils
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

import simba_compile.backend
from simba_compile.cli.models import going_on

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=139 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
TYPES = {
    **{"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i1": torch.bool},
    **{"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8},
}
MODE = FakeTensorMode()
launches: collections.Counter[str] = collections.Counter()
sources: list[str] = []  # Inductor's code
graphs: list[Recorded] = []
returned: list[tuple[int, weakref.ref[Tensor]]] = []  # by recorded graphs: when, and what


# --- launches --------------------------------------------------------------------------------------------------------


class Launcher:
    """Stands for what Triton compiles to start a kernel, and looks at what it is given."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.kinds = source.fn.__name__, list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, *given: Any) -> None:
        args = given[6:]  # stream, function, metadata, hooks
        assert len(args) == len(self.kinds), (self.name, len(args), len(self.kinds))
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (self.name, x, y, z)
        for value, kind in zip(args, self.kinds, strict=True):
            assert is_of_kind(value, kind), (self.name, value, kind)
        launches[self.name] += 1


def is_of_kind(value: Any, kind: str) -> bool:
    """Whether an argument is what a kernel was compiled for."""
    if kind.startswith("*"):
        return isinstance(value, Tensor) and value.device.type == "cuda" and value.dtype == TYPES[kind[1:]]
    if kind.startswith("i"):
        return isinstance(value, int) and (kind != "i32" or -(2**31) <= value < 2**31)
    return kind == "constexpr" or isinstance(value, int | float)


class Driver:
    """Triton's, of a GPU that does nothing."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda _: {
            "max_shared_mem": H200.shared_memory_per_block_optin, "multiprocessor_count": H200.multi_processor_count,
            "warpSize": 32, "max_num_regs": H200.regs_per_multiprocessor,
        },
    )  # fmt: skip
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)


# --- recorded graphs -------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for one of Inductor's CUDA graphs."""

    def __init__(self, model: Callable, static_input_idxs: Sequence[int] = (), **about: Any) -> None:
        self.model, self.static, self.about = model, static_input_idxs, about
        self.copied: list[tuple[int, ...]] = []
        self.calls = 0
        graphs.append(self)

    def __call__(self, inputs: list[Any]) -> Any:
        now = GenerationTracker.generation
        tensors = {id(value) for value in inputs if isinstance(value, Tensor)}
        alive = [(made, value) for made, known in returned if (value := known()) is not None]
        lost = [tuple(value.shape) for made, value in alive if made != now and id(value) in tensors]
        assert not lost, f"outputs of a CUDA graph that were overwritten are read: {lost}"
        recorded = {id(value) for _, value in alive}
        returned[:] = [(made, weakref.ref(value)) for made, value in alive if made == now]
        names = {name: self.about[name] for name in ("mutated_input_idxs", "placeholders")}
        function: Any = SimpleNamespace(static_input_idxs=self.static, **names)
        reason = cudagraph_utils.check_for_mutation(function, inputs, lambda value: id(value) in recorded)
        assert reason is None, reason
        given = [(place, value) for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        assert all(value.device.type == "cuda" for _, value in given)
        self.copied = [tuple(value.shape) for place, value in given if place not in self.static]
        self.calls += 1
        values = self.model(inputs)
        made = [value for value in values if isinstance(value, Tensor) and id(value) not in tensors]
        returned.extend((now, weakref.ref(value)) for value in made)
        return values


# --- torch without a GPU ---------------------------------------------------------------------------------------------


def install() -> None:
    """Have torch take it that there is an H200."""
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    answers = {
        **{"is_available": True, "is_initialized": False, "device_count": 1, "current_device": 0, "set_device": None},
        **{"get_device_name": H200.name, "get_device_properties": H200, "get_device_capability": (9, 0)},
        **{"_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None, "synchronize": None},
        **{"is_current_stream_capturing": False},
        **{"get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None},
    }
    for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name, value in answers.items():
            if hasattr(place, name):
                setattr(place, name, answering(value) if place is torch.cuda else staticmethod(answering(value)))
    CudaInterface.exchange_device = CudaInterface.maybe_exchange_device = staticmethod(answering(0))
    CudaInterface.get_raw_stream = staticmethod(answering(0))
    CudaInterface.get_compute_capability = staticmethod(answering(90))
    torch._C._cuda_getCurrentRawStream = answering(0)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._dynamo.guards._empty_strided_cuda = empty
    torch._C._dynamo.guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset
    )
    FakeTensorMode.avoid_device_init = True
    torch._subclasses.fake_tensor.init_gpu_context = answering(None)
    for place in (utils, builder):  # a fake parameter is of no class of its own
        place.tensor_always_has_static_shape = with_parameters(utils.tensor_always_has_static_shape)
    config = torch._inductor.config
    config.shape_padding = config.use_static_triton_launcher = False  # these time products,
    config.joint_graph_constant_folding = False  # or compute
    config.force_disable_caches = config.triton.cudagraph_or_error = True
    config.compile_threads = 1
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"), (misc_patterns, "_misc_patterns_init")):
        setattr(module, name, on_cpu(getattr(module, name)))  # they trace examples
    compile_fx.copy_misaligned_inputs = answering(([], []))  # asks for addresses
    sys.modules["torch._inductor.utils"].copy_misaligned_inputs = answering(([], []))
    compile_fx.cudagraphify = Recorded
    triton_heuristics.CachingAutotuner.benchmark_all_configs = lambda self, *_, **__: dict.fromkeys(self.launchers, 1.0)
    GraphLowering.save_output_code = staticmethod(sources.append)
    simba_compile.backend.compile_inner = without_constants(simba_compile.backend.compile_inner)


def answering(value: Any) -> Callable:
    return lambda *_, **__: value


def on_cpu(function: Callable) -> Callable:
    return lambda device=None: function(torch.device("cpu"))


def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    with MODE:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def with_parameters(known: Callable) -> Callable:
    def has_static_shape(tensor: Any, is_tensor: bool, tensor_source: Any) -> Any:
        parameter = (True, utils.TensorStaticReason.PARAMETER)
        return parameter if isinstance(tensor, nn.Parameter) else known(tensor, is_tensor, tensor_source)

    return has_static_shape


def without_constants(known: Callable) -> Callable:
    """Make an empty torch.tensor, which only a GPU could make while it is traced, by torch.empty."""

    def compile_inner(gm: GraphModule, *args: Any, **kwargs: Any) -> Callable:
        for node in gm.graph.nodes:
            if node.target is torch.tensor and node.args == ([],):
                node.target, node.args = torch.empty, (0,)
        gm.recompile()
        return known(gm, *args, **kwargs)

    return compile_inner


def to_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in [*module._parameters.items()]:
            if value is not None:
                fake = empty(value.shape, value.stride(), value.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, buffer in [*module._buffers.items()]:
            module._buffers[name] = None if buffer is None else empty(buffer.shape, buffer.stride(), buffer.dtype)
    return model


def main(families: Sequence[str]) -> None:
    """Compile and run a prompt and three steps of each family, and say what was recorded and started."""
    install()
    for family in families:
        torch._dynamo.reset()
        for known in (launches, sources, graphs, returned):
            known.clear()
        model = to_gpu(tiny_model(family).to(torch.bfloat16))
        ids, one = (empty((2, tokens), (tokens, 1), torch.int64) for tokens in (300, 1))
        with torch.no_grad():
            fast = torch.compile(model, backend="simba", mode="reduce-overhead")
            out = fast(ids, use_cache=True)
            for _ in range(3):
                out = fast(one, **going_on(out), use_cache=True)
        waits = [word for word in ("empty_strided_cpu(", ".item()", ".cpu()") for source in sources if word in source]
        assert not waits, waits
        for graph in graphs:
            print(f"{family}: recorded, {graph.calls} calls, copies {graph.copied} into the graph")
        print(f"{family}: {dict(launches)}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:] or ["mamba", "mamba2", "jamba"])

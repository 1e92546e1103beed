"""What the host does to start the kernels of an eager pruned prompt, and of a decoding step, on a GPU; without a GPU.

    python benchmarks/launches.py [--kind mamba2]

A model of tiny layers in bfloat16 runs on the CPU, whose tensors are taken for a GPU's. Triton's launches go all the way to
its driver, which does nothing. Products are left out, and torch's other operations have so few numbers that they, too, cost
what it takes to call them. What CUDA takes to queue each kernel comes on top.
"""

import sys
from collections import deque
from collections.abc import Callable, MutableSequence
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import transformers
import triton
import typer
from torch import Tensor
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

import simba_compile.backend
from simba_compile.cli.models import going_on, quiet, random_ids
from simba_compile.cli.timing import side_by_side
from simba_compile.eager import as_it_is
from simba_compile.kernels.gpu import runtime
from simba_compile.kernels.ops import dispatch
from simba_compile.passes.lower import linear_onto
from simba_compile.passes.tokens import LINEAR

SIZES = {"hidden_size": 16, "vocab_size": 256}
KINDS = {
    "mamba": lambda layers: transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=layers, **SIZES)),
    "mamba2": lambda layers: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(num_hidden_layers=layers, num_heads=2, head_dim=16, n_groups=1, state_size=16, **SIZES)
    ),
}


class NoDriver:
    """Triton's driver of a GPU that is not there: everything is compiled, nothing runs.

    Attributes
    ----------
    started : sequence of tuple
        For each kernel that was started: what it was compiled from, its programs, and its arguments.
    """

    def __init__(self) -> None:
        self.started: MutableSequence[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        def run(programs: int, *rest: Any) -> None:  # two axes of one program, stream, function, metadata, three hooks
            self.started.append((source, programs, *rest[8:]))

        return run


def launch_by_triton(kernel: Any, grid: tuple[int], *args: Any, **constants: Any) -> None:
    """`runtime.launch`, but that Triton finds what it has compiled."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def without_products(gm: GraphModule, *_: Any, **__: Any) -> Callable:
    """What runs a graph as it is, but for its products, which leave their results as the memory was."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def onto(residual: Tensor, x: Tensor, weight: Tensor, fresh: bool) -> Tensor:
        return residual if fresh else torch.empty_like(residual)

    for node in gm.graph.nodes:
        if node.target in LINEAR:
            node.target = product
        elif node.target is linear_onto:
            node.target = onto
    gm.recompile()
    return as_it_is(gm)


def take_the_cpu_for_a_gpu(driver: NoDriver) -> None:
    """Lower graphs as for a GPU, and start kernels by this driver."""
    triton.runtime.driver.set_active(driver)
    dispatch.GPU = "cpu"
    sys.modules["simba_compile.passes.lower"]._is_on_cpu = lambda node: False  # type: ignore[attr-defined]
    simba_compile.backend.compile_inner = without_products  # type: ignore[assignment]


def main(
    kind: Annotated[str, typer.Option(help=f"The model: {', '.join(KINDS)}.")] = "mamba",
    layers: Annotated[int, typer.Option(help="How deep it is.", min=1)] = 64,
) -> None:
    """Time what the host does for a layer of a prompt and of a step, with our way of launching kernels and with Triton's."""
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r}; expected {' or '.join(KINDS)}.", param_hint="--kind")
    quiet()
    torch.set_num_threads(1)
    driver = NoDriver()
    take_the_cpu_for_a_gpu(driver)
    model = KINDS[kind](layers).eval().to(torch.bfloat16)
    compiled = torch.compile(model, backend="simba", options={"keep": 0.1}, fullgraph=True)
    ids = random_ids(256, 200)
    ways = {"our way": runtime.launch, "Triton's way": launch_by_triton}

    def choose(way: str) -> None:
        runtime.launch = ways[way]

    with torch.no_grad():
        after = going_on(compiled(ids, logits_to_keep=1))
        jobs = {"prompt": lambda: compiled(ids, logits_to_keep=1), "step": lambda: compiled(ids[:, :1], **after)}
        print(f"{kind}, {layers} layers: microseconds of the host for a layer, medians of 20")
        for name, call in jobs.items():
            call()
            driver.started = []
            call()
            kernels = len(driver.started) / layers
            driver.started = deque(maxlen=0)  # what is kept would be memory that no later kernel gets again
            taken = side_by_side(dict.fromkeys(ways, call), dict.fromkeys(ways, 20), choose)
            found = ", ".join(f"{1e6 * timing.median / layers:.0f} ({way})" for way, timing in taken.items())
            print(f"{name}: {kernels:.1f} kernels of ours, {found}")


if __name__ == "__main__":
    typer.run(main)

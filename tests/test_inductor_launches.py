"""Inductor's code for a graph with our Triton kernels, run: what it passes to them, and what it makes of their results.

The CPU is taken for a GPU while Inductor compiles. The kernels that its code starts run in Triton's interpreter, in another
process, with the arguments that Inductor gives them: views, strides, lengths, what is missing, what it reuses memory for.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from conftest import close, have_products_of_torch, random_ids, simba, tiny_model
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton_targets
from interpreter_server import Place
from torch._dynamo.device_interface import CpuInterface
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_heuristics

from simba_compile.cli.models import going_on
from simba_compile.kernels import gpu
from simba_compile.kernels.ops import dispatch

OPS = torch.ops.simba
SERVER = Path(__file__).parent / "interpreter_server.py"


class Launcher:
    """What stands in Inductor's code for a compiled kernel.

    Parameters
    ----------
    process : Popen
        The server.
    name : str
        The kernel.
    source : str
        Inductor's text of it: a module with the kernel, what it calls and the constants that it names.
    """

    def __init__(self, process: subprocess.Popen, name: str, source: str) -> None:
        self.process, self.name = process, name
        loaded: list[tuple[Any, dict[str, Any], Any, Any]] = []

        def heuristic(configs: Any, inductor_meta: Any, triton_meta: Any, **others: Any) -> Callable:
            return lambda kernel: loaded.append((kernel, triton_meta, inductor_meta, configs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_heuristics, "user_autotune", heuristic)
            PyCodeCache.load(source)
        ((kernel, about, declared, (config,)),) = loaded
        compile_for_target(kernel, about, config)
        constants = declared.get("declared_constexpr_names", ())
        self.parameters = [name for name in about["signature"] if name not in constants]
        self.constants = about["constants"]

    def run(self, *args: Any, stream: object = None) -> None:
        """Have the server run it, and take over what it has written."""
        given = dict(zip(self.parameters, args, strict=False)) | self.constants
        memory: list[Tensor] = []
        places: dict[int, int] = {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                held = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                place = places.setdefault(held.data_ptr(), len(memory))
                if place == len(memory):
                    memory.append(held)
                given[name] = Place(place, value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
        pickle.dump((self.name, args[-3:], given, [bytes(held.numpy()) for held in memory]), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        assert not isinstance(answer, str), f"{self.name}: {answer}"
        for held, after in zip(memory, answer, strict=True):
            if after:
                held.copy_(torch.frombuffer(bytearray(after), dtype=torch.uint8))


def compile_for_target(kernel: Any, about: dict[str, Any], config: dict[str, Any]) -> None:
    """Triton makes machine code of Inductor's text, with the types, the constants and the alignment that stand there."""
    names = list(kernel.arg_names)
    signature = {name: about["signature"][name] for name in names}
    constants = {(names.index(name),): value for name, value in about["constants"].items()}
    source = triton.compiler.ASTSource(kernel, signature, constants, about["configs"][0])
    options = {option: config[option] for option in ("num_warps", "num_stages")}
    triton.compile(source, target=triton_targets.TARGETS["sm_90"], options=options)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inductor's code starts kernels in the interpreter; their names."""
    names: list[str] = []

    class Driver:
        get_current_target = staticmethod(lambda: triton_targets.TARGETS["sm_90"])
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    process = subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip

    def compiled(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Launcher:
        names.append(name)
        return Launcher(process, name, source)

    monkeypatch.setattr(AsyncCompile, "triton", compiled)
    # torch 2.15 asks whether there is a Triton for the CPU, and what options it takes.
    monkeypatch.setattr(CpuInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None), raising=False)
    backend = triton.compiler.compiler.make_backend(Driver.get_current_target())
    monkeypatch.setattr(triton.compiler.compiler, "make_backend", lambda target: backend)
    with torch._inductor.config.patch(force_disable_caches=True), process:
        yield names
        process.stdin.close()
    triton.runtime.driver._active = before


def assert_compiled_alike(
    function: Callable, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[Any, ...]], dynamic: bool = True
) -> None:
    """Compiled once for all calls, on our kernels, it gives what it gives eagerly on the definitions; also in place."""
    given = [tuple(value.clone() if isinstance(value, Tensor) else value for value in call) for call in calls]
    expected = [function(*call) for call in given]
    counters.clear()
    monkeypatch.setattr(dispatch, "GPU", "cpu")
    compiled = torch.compile(function, backend="inductor", dynamic=dynamic, fullgraph=True)
    for call, results, changed in zip(calls, expected, given, strict=True):
        for ours, theirs in zip([*compiled(*call), *call], [*results, *changed], strict=True):
            if isinstance(theirs, Tensor):
                close(ours, theirs, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_mixer_and_a_step_of_mamba(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections' pieces are read where they are; the windows and the state are written in place."""

    def mixer(
        hidden: Tensor, W: Tensor, V: Tensor, A: Tensor, window: Tensor, state: Tensor, weight: Tensor, k: int
    ) -> tuple[Tensor, ...]:
        x, z = (hidden @ W).split(8, -1)
        x = OPS.causal_conv1d(x, weight, None, True)
        dt, B, C = (x @ V).split([8, 4, 4], -1)
        kept = OPS.select(OPS.influence(x, dt, A, B, C, None, True, "max", True), k, 0, 1)
        y, last = OPS.selective_scan(x, dt, A, B, C, None, OPS.gather(z, kept, 1), None, True, kept)
        stream, normed = OPS.add_norm(hidden, y, None, 1e-5, kept)
        u = OPS.conv_update(window, z[:, -1], weight, None, True)
        step = OPS.state_update(state, u, dt[:, -1], A, B[:, -1], C[:, -1], None, None, None, True, True)
        return stream, OPS.rms_norm(normed, None, 1e-5), last, step

    calls = []
    for batch, tokens, k in ((3, 70, 9), (5, 90, 12)):
        fixed = (normal(8, 16), normal(8, 16), -normal(8, 4).abs(), normal(batch, 8, 4), normal(batch, 8, 4), normal(8, 4))
        calls.append((normal(batch, tokens, 8), *fixed, k))
    assert_compiled_alike(mixer, monkeypatch, calls)
    norms = {"_rms_norm", "_add_norm"}
    assert norms | {"_conv", "_chunk_scores", "_select", "scan_kernel", "_gather", "_conv_step", "_state_step"} <= {*started}


@pytest.mark.parametrize("batches", [(3, 5), (3,)], ids=["any-batch", "known-batch"])
def test_a_step_of_a_whole_mixer(batches: tuple[int, ...], started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With two products between two kernels where the number of sequences is not known, and with one where it is."""
    products: set[int] = set()  # by the rows of their weights

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        products.add(int(weight.shape[0]))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(gpu.mixer, "F", types.SimpleNamespace(linear=linear))
    weights = (normal(8, 4), None, normal(38, 8), normal(8, 6), normal(8), normal(8, 16), normal(8))
    calls = [(normal(n, 8, 16), normal(n, 8, 4), normal(n, 1, 16), *weights) for n in batches]
    assert_compiled_alike(lambda *args: (OPS.mixer_update(*args),), monkeypatch, calls, dynamic=len(batches) > 1)
    assert {*started} == {"_conv_step", "_state_step"}
    assert products == ({38, 8} if len(batches) > 1 else {38})


@pytest.mark.parametrize("norm_groups", [0, 2])
def test_a_step_of_a_whole_mixer_of_mamba2(norm_groups: int, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels alone: nothing of the views between them is left."""
    weights = (normal(24, 4), normal(24), normal(4), normal(4), normal(4), normal(16) if norm_groups else None, 1e-5)
    calls = [(normal(n, 4, 4, 4), normal(n, 24, 4), normal(n, 1, 44), *weights, norm_groups) for n in (3, 5)]
    assert_compiled_alike(lambda *args: (OPS.ssd_mixer_update(*args),), monkeypatch, calls)
    assert {*started} == {"_conv_step", "_ssd_step"} | ({"_rms_norm"} if norm_groups else set())


def test_a_mixer_and_a_step_of_mamba2(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of the steps, among them infinity, which Inductor passes as double."""

    def mixer(hidden: Tensor, W: Tensor, A: Tensor, state: Tensor, k: int) -> tuple[Tensor, ...]:
        x, z, B, C, dt = (hidden @ W).split([16, 16, 4, 4, 2], -1)
        x, B, C = x.unflatten(-1, (2, 8)), B.unflatten(-1, (1, 4)), C.unflatten(-1, (1, 4))
        limits = (0.01, float("inf"))
        kept = OPS.select(OPS.ssd_influence(x, dt, A, B, C, None, True, *limits, "l2", True), k, 0, 1)
        y, last = OPS.ssd_scan(x, dt, A, B, C, A, None, True, *limits, None, kept)
        normed = OPS.gated_norm(y.flatten(2), OPS.gather(z, kept, 1), None, 1e-5, 2, torch.float64)
        step = OPS.ssd_state_update(state, x[:, -1], dt[:, -1], A, B[:, -1], C[:, -1], None, None, True, True)
        return normed, last, step

    calls = [
        (normal(batch, tokens, 8), normal(8, 42), -normal(2).abs(), normal(batch, 2, 8, 4), k)
        for batch, tokens, k in ((3, 70, 9), (5, 90, 12))
    ]
    assert_compiled_alike(mixer, monkeypatch, calls)
    assert {"_head_scores", "_select", "_states", "_outputs", "_rms_norm", "_ssd_step"} <= {*started}


@pytest.mark.parametrize(("batch", "lengths"), [(2, (21, 30)), (1, (150, 300))], ids=["two-sequences", "one-in-chunks"])
def test_a_whole_model(batch: int, lengths: tuple[int, ...], started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the backend: prompts of two lengths, pruned, on a cache, and a step; all of it in Inductor's code."""
    model = tiny_model(layers=2, hidden_size=8, state_size=4)
    expected, seen = [], []
    for inner, made in (("eager", expected), ("inductor", seen)):
        torch._dynamo.reset()
        if inner == "inductor":
            monkeypatch.setattr(dispatch, "GPU", "cpu")
            have_products_of_torch(monkeypatch)
        compiled = simba(model, keep=0.3, min_tokens=4, inner=inner)
        with torch.no_grad():
            for length in lengths:
                out = compiled(random_ids(batch, length), use_cache=True)
                step = compiled(random_ids(batch, 1), **going_on(out), use_cache=True)
                made += [out.logits, step.logits]
    for ours, theirs in zip(seen, expected, strict=True):
        close(ours, theirs, 1e-5)
    kernels = {"_conv", "_chunk_scores", "_select", "scan_kernel", "_gather", "_rms_norm", "_conv_step", "_state_step"}
    assert kernels <= {*started}

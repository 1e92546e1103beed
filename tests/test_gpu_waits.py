"""On a GPU the host never waits for it: the graphs of a model run on fake tensors, which have no numbers to wait for.

Reading a number of theirs, or a shape that depends on numbers, raises; what copies between the host's memory and the GPU's
is seen by a mode. The operators run as their launchers, with the launches left out. The device is "meta", which stands for
the GPU: torch built for the CPU can index no CUDA tensor, not even a fake one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OPERATORS, have_products_of_torch, left_padding, random_ids, simba
from families import FAMILIES, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import simba_compile.backend
from simba_compile.cli.models import going_on
from simba_compile.kernels.ops import dispatch
from simba_compile.passes.lower import rates

pytest.importorskip("triton")
from simba_compile.kernels.gpu import runtime

GPU = "meta"
OPTIONS: dict[str, Any] = {"keep": 0.3, "min_tokens": 4}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Crossings(TorchDispatchMode):
    """Refuse operations between the host's memory and the GPU's; a number on the host may be a kernel's argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in tree_flatten((args, kwargs, result))[0] if isinstance(value, Tensor)]
        devices = {value.device.type for value in given if value.dim() or func in COPIES}
        assert len(devices) <= 1, f"{func} goes from device to device"
        return result


class OnGpu(Interpreter):
    """Run a graph with our operators as Python functions, so that what they do inside is seen, too."""

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if "simba" in str(target):
            target = OPERATORS.get(name, target)
        assert target is not torch.tensor or not args[0], "numbers of the host go to the GPU"
        args, kwargs = tree_map(_moved, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def call_method(self, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map(_moved, (args, kwargs))
        return super().call_method(target, args, kwargs)


def _moved(value: Any) -> Any:
    """A device that the trace on the CPU has written into the graph."""
    return torch.device(GPU) if isinstance(value, torch.device) else value


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GraphModule, tuple]]:
    """The graphs that run, and what on."""
    calls: list[tuple[GraphModule, tuple]] = []

    def spy(gm: GraphModule, inner: str, mode: str | None = None, **_: Any) -> Callable:
        def run(*args: Any) -> Any:
            calls.append((gm, args))
            return gm(*args)

        return run

    monkeypatch.setattr(simba_compile.backend, "compile_inner", spy)
    have_products_of_torch(monkeypatch)
    return calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would be started."""
    monkeypatch.setattr(dispatch, "GPU", GPU)
    started: list[str] = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, *args, **constants: started.append(kernel.__name__))
    return started


def run_on_fake_gpu(graph: GraphModule, args: tuple) -> Any:
    """Run a graph with tensors like these on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        moved = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            if isinstance(value, Tensor)
            else value
            for value in args
        ]
        with Crossings():
            return OnGpu(graph).run(*moved)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "granitemoehybrid"])
def test_neither_prompt_nor_step_waits(family: str, called: list, launched: list[str]) -> None:
    """A padded prompt with a cache and all its logits, then a step; both on our kernels."""
    model, ids, mask = tiny_model(family), random_ids(2, 40), left_padding(2, 40)
    compiled = simba(model, **OPTIONS)
    with torch.no_grad():
        out = compiled(ids, attention_mask=mask, use_cache=True)
        longer = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1)} if FAMILIES[family].attends else {}
        compiled(ids[:, :1], **going_on(out), **longer, use_cache=True)
    assert len(called) == 2
    for (graph, args), kernels in zip(called, ({"_select", "_conv"}, {"_conv_step"}), strict=True):
        launched.clear()
        run_on_fake_gpu(graph, args)
        assert kernels <= set(launched)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_halves_add_and_norm_at_once(family: str, called: list, launched: list[str]) -> None:
    """Between two layers of a model whose residual stream is wider than they are, in a prompt as in a step."""
    model, ids = tiny_model(family, torch.bfloat16), random_ids(2, 40)
    compiled = simba(model, **OPTIONS)
    with torch.no_grad():
        out = compiled(ids, logits_to_keep=1, use_cache=True)
        compiled(ids[:, :1], **going_on(out), use_cache=True)
    layers = model.config.num_hidden_layers
    prompt = [node.target for node in called[0][0].graph.nodes]
    assert not {torch.zeros, torch.zeros_like} & {*prompt}  # caches are filled at once
    assert prompt.count(rates) == prompt.count(torch.ops.simba.selective_scan)
    for graph, args in called:
        launched.clear()
        run_on_fake_gpu(graph, args)
        assert launched.count("_add_norm") == layers - 1
        casts = [node for node in graph.graph.nodes if node.target in ("to", "float")]
        of_tokens = [node for node in casts if node.meta["example_value"].dim() > 2]
        assert len(of_tokens) == 3  # the stream at first, the last norm's output for the head, and the logits


@pytest.mark.parametrize("criterion", ["uniform", "recent"])
def test_other_criteria_do_not_wait(criterion: str, called: list, launched: list[str]) -> None:
    with torch.no_grad():
        simba(tiny_model("mamba"), criterion=criterion, **OPTIONS)(random_ids(2, 40), logits_to_keep=1)
    run_on_fake_gpu(*called[0])
    assert "_select" in launched


@pytest.mark.parametrize(
    ("wait", "seen"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x.cpu(), AssertionError),
        (lambda x: torch.ones(3).to(x.device), AssertionError),
    ],
)
def test_a_wait_would_be_seen(wait: Callable[[Tensor], Any], seen: type[Exception]) -> None:
    """Each way of waiting raises."""

    class Waiting(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wait(x)

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(wait, (x,)))
    with pytest.raises(seen):
        run_on_fake_gpu(GraphModule(Waiting(), graph), (torch.ones(3),))

"""Where nothing is recorded, a graph's operators are called past autograd and the dispatcher; elsewhere all is as ever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import KEEP_FEW, close, pruned_exactly, random_ids, simba, tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simba_compile.eager import is_watched, records_nothing
from simba_compile.kernels.ops import dispatch

TAKES_TANGENTS = torch.__version__ < "2.14"  # TorchVersion; from then on Dynamo compiles nothing for a dual tensor
PAST: list[bool] = []  # for each call of `probe`: whether autograd was passed by


@torch.compiler.allow_in_graph
def probe(x: Tensor) -> Tensor:
    """A node of the graph that sees how it is called."""
    PAST.append(torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality))
    return x * 1


class Probed(nn.Module):
    """A model whose graph ends in `probe`, in a mode that it sets by itself."""

    def __init__(self, model: nn.Module, mode: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, ids: Tensor) -> Tensor:
        if self.mode is None:
            return probe(self.model(ids).logits)
        with self.mode():
            return probe(self.model(ids).logits)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_a_graph_that_records_nothing(outer: Callable[[], Any], selected: list[Tensor]) -> None:
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 40)
    compiled = simba(Probed(model), **KEEP_FEW)
    with outer():
        logits = compiled(ids)
        assert PAST.pop()
    assert selected and not logits.requires_grad
    with torch.no_grad():
        close(logits, pruned_exactly(model, ids, None, **KEEP_FEW).logits, 1e-6)
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def in_a_graph_of_its_own(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(run, x, use_reentrant=False)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("within", [lambda run: run, torch.no_grad(), torch.enable_grad(), in_a_graph_of_its_own])
def test_tangents_are_refused_where_they_would_be_lost(mode: Callable[[], Any], within: Callable, inner: str) -> None:
    linear, h = nn.Linear(8, 8), torch.randn(2, 5, 8)
    refused = torch.compile(within(lambda x: linear(x) * 2), backend="simba", options={"inner": inner})
    with mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(h, torch.ones_like(h))
        if TAKES_TANGENTS:
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
                refused(dual)
        else:  # it runs uncompiled
            tangent = forward_ad.unpack_dual(refused(dual)).tangent
            torch.testing.assert_close(tangent, 2 * torch.ones_like(h) @ linear.weight.mT)
        tangent = forward_ad.unpack_dual(torch.compile(lambda x: x.sin() * 2, backend="simba")(dual)).tangent
    torch.testing.assert_close(tangent, h.cos() * 2)


def test_the_same_model_with_gradients() -> None:
    model, ids = Probed(tiny_model(dtype=torch.float64)), random_ids(2, 40)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        without = compiled(ids)
    logits = compiled(ids)
    assert not PAST.pop()
    close(logits, without, 1e-6)
    logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


@pytest.mark.parametrize("mode", [torch.enable_grad, lambda: torch.set_grad_enabled(True)], ids=["enable", "set"])
def test_gradients_that_a_model_records_by_itself(mode: Callable[[], Any]) -> None:
    model, ids = Probed(tiny_model(dtype=torch.float64), mode), random_ids(2, 40)
    with torch.no_grad():
        logits = simba(model, **KEEP_FEW)(ids)
    assert not PAST.pop()
    assert logits.requires_grad
    logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_regions_without_gradients_are_no_obstacle() -> None:
    with torch.no_grad():
        simba(Probed(tiny_model(), torch.no_grad), **KEEP_FEW)(random_ids(2, 40))
    assert PAST.pop()


def test_what_keeps_autograd() -> None:
    """Higher-order operators, which have rules for autograd's keys, and tensors that dispatch by themselves."""
    found: list[bool] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable:
        found.append(records_nothing(gm))
        return gm

    x = torch.randn(3)
    for function, given in (
        (lambda x: x.sin() + 1, x),
        (lambda x: checkpoint(torch.sin, x, use_reentrant=False), x),
        (lambda x: x.sin() + 1, TwoTensor(x, x + 1)),
    ):
        torch.compile(function, backend=backend, fullgraph=True)(given)
    assert found == [True, False, False]


# --- past the dispatcher -----------------------------------------------------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call of an operator of ours: whether it came through torch's dispatcher.

    Not those of `gather`, which another one may call.
    """
    came: list[bool] = []

    def frames() -> Iterator[str]:
        frame = sys._getframe()
        while frame.f_back is not None and not frame.f_code.co_name.startswith("test_"):
            frame = frame.f_back
            yield frame.f_code.co_filename

    def implementation(name: str, *tensors: Any) -> Callable:
        if name != "gather":
            came.append(any(file.endswith("torch/_ops.py") for file in frames()))
        return original(name, *tensors)

    original = dispatch.implementation
    for name, module in list(sys.modules.items()):
        if name.startswith("simba_compile.kernels.ops.") and hasattr(module, "implementation"):
            monkeypatch.setattr(module, "implementation", implementation)
    yield came


class Dispatches(TorchDispatchMode):
    """Lets everything pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Lets everything pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_operators_are_called_themselves_unless_something_watches(dispatched: list[bool]) -> None:
    model, ids = tiny_model(), random_ids(2, 40)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        expected = compiled(ids).logits
    assert dispatched and not any(dispatched)

    def called() -> list[bool]:
        dispatched.clear()
        close(compiled(ids).logits, expected, 1e-6)
        return dispatched

    assert all(called())  # gradients are recorded
    with torch.no_grad():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            assert all(called())
        assert {"simba::rms_norm", "simba::selective_scan", "simba::select"} <= {event.key for event in seen.key_averages()}
        assert not any(called())


def test_what_watches() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_watched())
        return x

    look(torch.ones(2))
    for mode in (Dispatches(), Functions(), profile(activities=[ProfilerActivity.CPU])):
        with mode:
            look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    look(torch.ones(2))
    assert seen == [False, True, True, True, True, False]

"""`mode="reduce-overhead"`: what passes between the CUDA graphs that Inductor records and everything else.

A stand-in for Inductor does on the CPU what its CUDA graphs do: what they return is overwritten at the next call of anything
compiled, and they write into no input, unless it is said to stay where it is. That Inductor records our graphs at all, and
that its code is right, was seen with devices that are not there (docs/kernels-gpu.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from conftest import random_ids, simba
from families import tiny_model
from torch import Tensor
from torch.fx import GraphModule

import simba_compile.backend
from simba_compile import cuda_graphs
from simba_compile.cli.models import going_on

INDUCTOR = simba_compile.backend.Inductor


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


class Recorder:
    """Inductor's CUDA graphs."""

    at: ClassVar[set[tuple[int, ...]]] = set()  # where what stays was
    returned: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()  # by the last call of any
    calls = 0

    def __init__(self, mode: str | None, options: dict[str, Any] | None, dynamic: bool) -> None:
        """Any mode records."""
        self.records_cuda_graphs = options is None

    def __call__(self, gm: GraphModule, _: Any) -> Callable:
        if not self.records_cuda_graphs:
            return gm
        inputs = gm.graph.find_nodes(op="placeholder")
        fixed = ["_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) for node in inputs]

        def run(*args: Any) -> Any:
            for value in Recorder.returned:
                if value.is_floating_point():
                    value.detach().fill_(torch.nan)
            free = [value for value, stays in zip(args, fixed, strict=True) if is_tensor(value) and not stays]
            before = [value.clone() for value in free]
            values = gm(*args)
            assert all(map(is_same, free, before)), "an input was written into: not recorded"
            given = {value.untyped_storage()._cdata for value in args if is_tensor(value)}
            Recorder.returned = weakref.WeakSet(
                value for value in values if is_tensor(value) and value.untyped_storage()._cdata not in given
            )
            Recorder.calls += 1
            Recorder.at.add(tuple(value.data_ptr() for value, stays in zip(args, fixed, strict=True) if stays))
            return values

        return run


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU."""
    monkeypatch.setattr(simba_compile.backend, "Inductor", Recorder)
    monkeypatch.setattr(cuda_graphs, "GPU", "cpu")
    monkeypatch.setattr(Recorder, "calls", 0)
    monkeypatch.setattr(Recorder, "at", set())


@pytest.mark.parametrize(("family", "gradients", "recorded"), [("mamba", torch.enable_grad, 4), ("jamba", torch.no_grad, 1)])
def test_decoding_goes_on_from_a_recorded_prompt(family: str, gradients: Callable, recorded: int) -> None:
    """Logits of three steps of two sequences are those of a prompt that is not recorded.

    With attention, steps have an open number of keys, at least from the second on, and are not recorded.
    """
    model, ids, options = tiny_model(family), random_ids(2, 40), {"keep": 0.3, "min_tokens": 4}

    def decoded(call: Callable) -> list[Tensor]:
        out = call(ids, use_cache=True)
        outputs = [out.logits]
        for _ in range(3):
            out = call(outputs[-1][:, -1:].argmax(-1), **going_on(out), use_cache=True)
            outputs.append(out.logits)
        return outputs

    with gradients():
        calls = [simba(model, **options, inner=inner) for inner in ("inductor", "eager")]
        for got, expected in zip(*map(decoded, calls), strict=True):
            torch.testing.assert_close(got, expected)
    assert recorded <= Recorder.calls <= max(recorded, 2)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_generate(family: str) -> None:
    """Two times: the second cache is elsewhere."""
    model, expected = tiny_model(family), tiny_model(family)
    expected.load_state_dict(model.state_dict())
    model.compile(backend="simba", options={"keep": 0.3, "min_tokens": 4, "inner": "inductor"})
    expected.compile(backend="simba", options={"keep": 0.3, "min_tokens": 4})
    for length in (40, 33):
        prompt = {"inputs": random_ids(2, length), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**prompt), expected.generate(**prompt))
    assert Recorder.calls == 2 * 6


def test_results_of_a_call_outlive_the_next() -> None:
    model = simba(tiny_model("mamba"), keep=0.3, min_tokens=4, inner="inductor")
    with torch.no_grad():
        first = model(random_ids(2, 40)).logits
        copy = first.clone()
        model(random_ids(2, 40))
    assert torch.equal(first, copy)


def test_a_step_is_compiled_for_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt for all lengths; a step of two sequences for two, so that kernels are chosen for them."""
    has_open_sizes: list[bool] = []

    class Seen(Recorder):
        def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable:
            has_open_sizes.append(any(isinstance(value, torch.SymInt) for value in inputs))
            return gm

    monkeypatch.setattr(simba_compile.backend, "Inductor", Seen)
    model = simba(tiny_model("mamba"), keep=0.3, min_tokens=4, inner="inductor")
    with torch.no_grad():
        out = model(random_ids(2, 40), use_cache=True)
        model(random_ids(2, 1), **going_on(out), use_cache=True)
    assert has_open_sizes == [True, False]


@pytest.mark.parametrize("gradients", [torch.inference_mode, torch.enable_grad])
def test_many_caches_are_not_recorded_one_by_one(gradients: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second on, states are copied to where one more recording has them."""
    monkeypatch.setattr(cuda_graphs, "RECORDINGS", 1)
    model, prompts = tiny_model("mamba"), [random_ids(2, length) for length in (40, 33, 51)]

    def decoded(call: Callable) -> list[Tensor]:
        outputs = [call(ids, use_cache=True) for ids in prompts]
        prompts_at = len(Recorder.at)
        for _ in range(2):
            last = zip(prompts, outputs[-3:], strict=True)
            outputs += [call(ids[:, -1:], **going_on(out), use_cache=True) for ids, out in last]
        assert len(Recorder.at) - prompts_at <= 2
        return [out.logits for out in outputs]

    with gradients():
        calls = [simba(model, keep=0.3, min_tokens=4, inner=inner) for inner in ("inductor", "eager")]
        for got, expected in zip(*map(decoded, calls), strict=True):
            torch.testing.assert_close(got, expected)


def views(x: Tensor) -> tuple[Tensor, Tensor]:
    return (y := x + 1), y[:, 1:]


@pytest.mark.parametrize(("function", "recorded"), [(views, False), (lambda x: (x + 1, x[:, 1:]), True)])
def test_values_that_share_memory_are_not_copied_apart(
    function: Callable, recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a view of an input become a copy."""
    x = torch.ones(2, 5)
    with caplog.at_level("INFO", "simba_compile"):
        one, other = torch.compile(function, backend="simba", options={"inner": "inductor"})(x)
    assert ("Not recorded as a CUDA graph: some of its results" in caplog.text) is not recorded
    one.add_(1)
    assert torch.equal(other, torch.full((2, 4), 1.0 if recorded else 3.0))
    assert Recorder.calls == recorded
    if recorded:
        x.add_(1)
        assert torch.equal(other, x[:, 1:])


def test_what_waits_for_the_host_is_not_recorded() -> None:
    with torch.no_grad():
        simba(tiny_model("mamba"), keep=0.3, min_tokens=4, inner="inductor", criterion="random")(random_ids(2, 40))
    assert Recorder.calls == 0


@pytest.mark.parametrize(
    ("mode", "options", "records"),
    [
        *(("reduce-overhead", None, True), ("max-autotune", None, True), (None, None, False), ("default", None, False)),
        *(("reduce-overhead", {"triton.cudagraphs": False}, False), ("max-autotune-no-cudagraphs", None, False)),
    ],
)
def test_modes_that_record(mode: str | None, options: dict[str, Any] | None, records: bool) -> None:
    assert INDUCTOR(mode, options, True).records_cuda_graphs is records
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert INDUCTOR(None, None, True).records_cuda_graphs


def test_nothing_is_recorded_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "GPU", "cuda")
    with torch.no_grad():
        simba(tiny_model("mamba"), keep=0.3, min_tokens=4, inner="inductor")(random_ids(2, 40))
    assert Recorder.calls == 0

"""What the tests share: a clean Dynamo for each of them, hypothesis's profile, and tiny Hugging Face models."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from eager_reference import Reference, pruned_forward
from kernel_inputs import DEVICE
from torch import Tensor, nn
from transformers import DynamicCache, FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import ModelOutput

import simba_compile.backend
from simba_compile.cli.models import going_on
from simba_compile.kernels import ops, reference
from simba_compile.kernels.native import binding
from simba_compile.kernels.native import tokens as native_tokens
from simba_compile.passes import Transformed
from simba_compile.passes.scans import SCANS

hypothesis.settings.register_profile(
    "simba", deadline=None, derandomize=True, max_examples=15, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("simba")

# Most of the suite's time goes into Dynamo's tracing. What it spends on logs that nobody reads (one has the time that guards
# take, with the processor's caches emptied for it), and on a cache of what torch's own operators return (it takes longer
# than asking them where lengths are symbols), is left out: together a quarter.
torch._dynamo.config.side_effect_replay_policy = "silent"
torch._dynamo.config.fake_tensor_cache_enabled = False
_TRACE = logging.getLogger("torch.__trace")
_TRACE.handlers.clear()  # it formats every graph for any handler,
_TRACE.propagate = True  # and pytest gives its own to each logger that does not propagate
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0  # type: ignore[attr-defined]

# Triton's interpreter is chosen for a whole process, and so is mamba_ssm by transformers: `test_triton.py` and
# `test_mamba_ssm.py` start these in processes of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or "SIMBA_TEST_DEVICE" in os.environ
collect_ignore_glob = [] if INTERPRETED else ["interpreted/*"]
collect_ignore_glob += [] if os.environ.get("SIMBA_WITH_MAMBA_SSM") == "1" else ["with_mamba_ssm/*"]

FAMILIES = {"mamba": (MambaForCausalLM, MambaConfig), "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig)}
each_family = pytest.mark.parametrize("family", sorted(FAMILIES))
VOCABULARY = 64
KEEP_FEW = {"keep": 0.2, "min_tokens": 4}
REGISTERED = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("simba::")}
OPERATORS = {  # the Python function of each of our operators
    name: getattr(module, name)
    for module in (getattr(ops, part) for part in ops.__all__)
    for name in REGISTERED & vars(module).keys()
}
SELECTING = native_tokens if binding.available() else reference  # whose `select` runs on the CPU


def pytest_collectstart() -> None:
    """What a module draws as it is imported is the same in every run: torch's own first seed is not."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What the imports have left behind stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees what another one compiled, or its seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """No test leaves our log quieter than it found it, as a command may that it calls (`benchmarks/measure.py`)."""
    log = logging.getLogger("simba_compile")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def on_device() -> Iterator[None]:
    """New tensors are made where ``SIMBA_TEST_DEVICE=cuda python -m pytest tests/interpreted`` says: compiled, on a GPU."""
    torch.set_default_device(None if DEVICE == "cpu" else DEVICE)
    yield
    torch.set_default_device(None)
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # a bad address ends the context, and would fail all tests that follow in the process
            print(error, file=sys.__stderr__, flush=True)
            os._exit(70)  # xdist lays it to this test's charge, and starts another worker


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What every `simba::select` of the test returned."""
    results: list[Tensor] = []
    original = SELECTING.select

    def spy(*args: Any) -> Tensor:
        results.append(original(*args))
        return results[-1]

    monkeypatch.setattr(SELECTING, "select", spy)
    return results


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Transformed]:
    """What the passes made of every graph of the test."""
    results: list[Transformed] = []
    original = simba_compile.backend.transform

    def spy(*args: Any) -> Transformed:
        results.append(original(*args))
        return results[-1]

    monkeypatch.setattr(simba_compile.backend, "transform", spy)
    return results


class ExactNorm(nn.Module):
    """An RMS norm, gated or not, in its input's own type; those of Hugging Face round to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weightless = hasattr(norm, "eps")  # those that FalconMamba has inside its mixers
        self.weight = None if weightless else norm.weight
        self.variance_epsilon = norm.eps if weightless else norm.variance_epsilon
        self.group_size = getattr(norm, "group_size", None)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Gate, then normalise the last axis group by group."""
        if gate is not None:
            x = x * F.silu(gate)
        groups = x.unflatten(-1, (-1, self.group_size or x.shape[-1]))
        normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return normed.flatten(-2) if self.weight is None else self.weight * normed.flatten(-2)


def tiny_model(
    family: str = "mamba", dtype: torch.dtype = torch.float32, *, layers: int = 3, seed: int = 0, **config: Any
) -> nn.Module:
    """A tiny model of this family in eval mode, with weights so spread that tokens differ in their influence.

    Parameters
    ----------
    family : {"mamba", "falcon_mamba"}
        The Hugging Face class.
    dtype : torch.dtype
        Of its weights. In float64 the residual stream and the norms are in float64 too.
    layers, seed : int
        How many layers, and what the weights are drawn from.
    **config
        Further fields of its configuration.
    """
    model_class, config_class = FAMILIES[family]
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "state_size": 8,
        "vocab_size": VOCABULARY,
        "residual_in_fp32": dtype != torch.float64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**fields, **config})).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_()
        for block in model.backbone.layers:
            mixer = block.mixer
            mixer.in_proj.weight.normal_(std=0.3)
            mixer.x_proj.weight.normal_(std=0.3)
            mixer.dt_proj.weight.normal_(std=0.5)
            mixer.conv1d.weight.normal_(std=0.5)
            mixer.out_proj.weight.normal_(std=0.15)
            mixer.D.normal_()
            mixer.A_log.add_(0.3 * torch.randn_like(mixer.A_log))
            block.norm.weight.add_(0.1 * torch.randn_like(block.norm.weight))
    if dtype == torch.float64:
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if "norm" in name:
                    setattr(module, name, ExactNorm(child))
    return model.to(dtype)


def have_products_of_torch(patch: pytest.MonkeyPatch) -> None:
    """Lower as for a GPU, where linear layers are torch's."""
    lowering = importlib.import_module("simba_compile.passes.lower")  # the package has the function of this name
    patch.setattr(lowering, "_is_on_cpu", lambda node: False)


def simba(model: Any, fullgraph: bool = True, dynamic: bool | None = None, **options: Any) -> Callable:
    """The model under our backend."""
    return torch.compile(model, backend="simba", fullgraph=fullgraph, dynamic=dynamic, options=options)


def assert_as_eager(function: Callable, *shapes: tuple[int, ...]) -> None:
    """A function without mixers gives the same under our backend, of random tensors of these shapes; gradients, too."""
    results = []
    for run in (function, simba(function)):
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        result = run(*given)
        if result.requires_grad:
            result.float().square().sum().backward()
        results.append([result, *(value.grad for value in given)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.requires_grad == expected.requires_grad
            torch.testing.assert_close(found, expected)


@contextlib.contextmanager
def exact_casts() -> Iterator[None]:
    """Leave out the casts of activations from float64 to float32 that Hugging Face makes; those of parameters stay."""
    cast = Tensor.float

    def keep_wide(x: Tensor) -> Tensor:
        return x if x.dim() >= 3 and x.dtype == torch.float64 else cast(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", keep_wide)
        yield


def pruned_exactly(model: nn.Module, *args: Any, **kwargs: Any) -> Reference:
    """`pruned_forward` of a float64 model, in float64 all through."""
    with exact_casts():
        return pruned_forward(model, *args, **kwargs)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids, (batch, length), none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_steps_with_our_operators(prompt: Transformed, step: Transformed) -> None:
    """Where the graph of a prompt has a scan, that of a step has its update, which makes A of its logarithm itself."""
    ops = torch.ops.simba
    updates = {ops.state_update, ops.ssd_state_update, ops.mixer_update, ops.ssd_mixer_update}
    scans = sum(node.target in SCANS for node in prompt.dense.graph.nodes)
    targets = [node.target for node in step.dense.graph.nodes]
    assert sum(target in updates for target in targets) == scans > 0
    assert not {torch.exp, "exp"} & {*targets}


def left_padding(batch: int, length: int) -> Tensor:
    """An attention mask: sequence i is padded on the left with 5·i tokens (none is padded whole)."""
    pads = torch.arange(batch)[:, None] * 5 % max(length - 1, 1)
    return (torch.arange(length)[None] >= pads).long()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal but for a share of the largest magnitude; NaN are in the same places."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size, equal_nan=True)


def original_places(chosen: list[Tensor], entering: int) -> list[list[list[int]]]:
    """Positions in the sequence after each selection that dropped something."""
    places, kept = torch.arange(entering).expand(chosen[0].shape[0] if chosen else 1, -1), []
    for index in chosen:
        if index.shape[1] < places.shape[1]:
            places = places.gather(1, index)
            kept.append(places.tolist())
    return kept


def cache_of(output: ModelOutput) -> DynamicCache:
    """The cache that a model returned, by the name that it has there."""
    return next(iter(going_on(output).values()))


def conv_states(cache: DynamicCache) -> list[Tensor]:
    """The convolution's window of each layer."""
    return [layer.conv_states[0] for layer in cache.layers]


def ssm_states(cache: DynamicCache) -> list[Tensor]:
    """The scan's last state of each layer."""
    return [layer.recurrent_states[0] for layer in cache.layers]


def assert_as_contracted(
    compiled: Callable, model: nn.Module, ids: Tensor, mask: Tensor | None, selected: list[Tensor], **options: Any
) -> Reference:
    """Logits, hidden states, cache and kept positions of a float64 model are those of the eager reference."""
    selected.clear()
    with torch.no_grad():
        out = compiled(ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
        expected = pruned_exactly(model, ids, mask, **options)
    length = ids.shape[1]
    kept = [places for before, places in zip([None, *expected.kept], expected.kept, strict=False)
            if places.shape[1] < (length if before is None else before.shape[1])]  # fmt: skip
    assert original_places(selected, length) == [places.tolist() for places in kept]
    close(out.logits, expected.logits, 1e-6)  # logits are float32
    assert len(out.hidden_states) == len(expected.hidden_states)
    for actual, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(actual, wanted, 1e-11)
    for actual, wanted in zip(conv_states(cache_of(out)), expected.conv_states, strict=True):
        close(actual, wanted, 1e-11)
    for actual, wanted in zip(ssm_states(cache_of(out)), expected.ssm_states, strict=True):
        close(actual, wanted, 1e-11)
    return expected

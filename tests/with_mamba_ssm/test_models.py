"""mamba_ssm's own models under our backend, on the CPU.

Its kernels need a GPU; here they are lifted before they run. What stands in their place is held against the reference
functions that mamba_ssm brings, and pruned models against `family_reference`, which runs a Hugging Face model of the same
weights.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCABULARY, ExactNorm, close, original_places, random_ids, simba
from families import spread_weights
from family_reference import pruned_forward, reference_generate
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules import mamba2, mamba_simple
from mamba_ssm.ops import selective_scan_interface
from mamba_ssm.ops.triton import layer_norm, layernorm_gated, selective_state_update, ssd_combined
from mamba_ssm.utils.generation import InferenceParams
from torch import Tensor, nn

from simba_compile import capture, substitutes
from simba_compile.passes import Transformed

PRUNED: dict[str, Any] = {"keep": 0.3, "min_tokens": 4}
HIDDEN, LAYERS, LENGTH, NEW_TOKENS = 32, 3, 40, 4
SIZES = {  # of mamba_ssm's mixers, and in the words of transformers
    "Mamba1": ({"d_state": 6}, {"state_size": 6}),
    "Mamba2": (
        {"d_state": 6, "headdim": 8, "ngroups": 2, "chunk_size": 16, "dt_limit": (0.03, 0.3)},
        {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "time_step_limit": (0.03, 0.3)},
    ),
}
each_layer = pytest.mark.parametrize("layer", SIZES)
each_path = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


# --- causal_conv1d in PyTorch -------------------------------------------------------------------------------------------


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The function of that name in causal_conv1d; x is (batch, channel, token)."""
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))[..., : x.shape[-1]]
    return y if activation is None else F.silu(y)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The function of that name in causal_conv1d; x is (batch, channel)."""
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
    y = (conv_state * weight).sum(-1) + (0 if bias is None else bias)
    return y if activation is None else F.silu(y)


@pytest.fixture(scope="module", autouse=True)
def lifted() -> None:
    """`capture` lifts what it finds in causal_conv1d: here, the functions above."""
    name = "causal_conv1d.causal_conv1d_interface"
    module = types.ModuleType(name)
    module.causal_conv1d_fn, module.causal_conv1d_update = causal_conv1d_fn, causal_conv1d_update  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        capture._substitute(name, capture.PACKAGES[name])
    # einops remembers each type of tensor that it has met, and Dynamo compiles once more where there is a new one.
    einops.rearrange(nn.Parameter(torch.zeros(1)), "i -> i")


@pytest.fixture
def paths(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused paths of the mixers want causal_conv1d; the plain ones are what runs where it is not installed."""
    for module in (mamba_simple, mamba2):
        monkeypatch.setattr(module, "causal_conv1d_fn", causal_conv1d_fn if fused else None)
        monkeypatch.setattr(module, "causal_conv1d_update", causal_conv1d_update if fused else None)
    if not fused:  # as where Triton is not installed
        monkeypatch.setattr(mamba_simple, "selective_state_update", None)


# --- models -------------------------------------------------------------------------------------------------------------


def models(layer: str, fused: bool) -> tuple[nn.Module, nn.Module]:
    """A language model of mamba_ssm's in float64, and Hugging Face's with the same weights."""
    ours, theirs = SIZES[layer]
    path = {"use_fast_path" if layer == "Mamba1" else "use_mem_eff_path": fused}
    fields = {"d_model": HIDDEN, "n_layer": LAYERS, "vocab_size": VOCABULARY, "ssm_cfg": {"layer": layer, **ours, **path}}
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**fields, rms_norm=True, fused_add_norm=fused, residual_in_fp32=False)).eval()
    spread_weights(model)
    model.double()
    name = "Mamba" if layer == "Mamba1" else "Mamba2"
    config = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "residual_in_fp32": False}
    special = {"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    twin = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config, **special, **theirs))
    twin.double().eval()
    weights = {key.replace("embedding.", "embeddings."): value for key, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    for module in [*twin.modules()]:
        for child_name, child in module.named_children():
            if "norm" in child_name:
                setattr(module, child_name, ExactNorm(child))
    return model, twin


@each_path
@each_layer
def test_a_prompt(layer: str, fused: bool, paths: None, selected: list[Tensor], graphs: list[Transformed]) -> None:
    """One graph for several lengths and batch sizes; kept tokens, logits of every position, gradients."""
    model, twin = models(layer, fused)
    compiled = simba(model, **PRUNED)
    for batch, length in ((2, LENGTH), (3, 57), (4, 23)):
        ids = random_ids(batch, length, seed=length)
        selected.clear()
        logits = compiled(ids).logits
        expected = pruned_forward(twin, ids, **PRUNED)
        assert original_places(selected, length) == [places.tolist() for places in expected.kept[1:]]
        close(logits, expected.logits, 1e-10)
    assert len(graphs) == 1 and [mixer.path for mixer in graphs[0].mixers] == [
        f"backbone.layers.{place}.mixer" for place in range(LAYERS)
    ]

    logits.logsumexp(-1).sum().backward()
    expected.logits.logsumexp(-1).sum().backward()
    right = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        gradient = right[name.replace("embedding.", "embeddings.")].grad
        assert gradient.any(), name
        close(weight.grad, gradient, 1e-5)


@each_path
@each_layer
def test_generation(layer: str, fused: bool, paths: None, selected: list[Tensor]) -> None:
    """A prompt and steps after it, with mamba_ssm's own cache."""
    model, twin = models(layer, fused)
    ids = random_ids(3, LENGTH)
    compiled = simba(model, **PRUNED)
    cache = InferenceParams(max_seqlen=LENGTH + NEW_TOKENS, max_batch_size=3)
    written, logits, entering = [], [], ids
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits.append(compiled(entering, inference_params=cache, num_last_tokens=1).logits[:, 0])
            written.append(logits[-1].argmax(-1))
            cache.seqlen_offset += entering.shape[1]
            entering = written[-1][:, None]
        expected, right = reference_generate(twin, ids, None, NEW_TOKENS, **PRUNED)
    assert len(selected) == LAYERS - 1  # steps prune nothing
    close(torch.stack(logits, 1), right, 1e-6)
    assert torch.equal(torch.stack(written, 1), expected)


@each_layer
def test_a_mixer_alone(layer: str, monkeypatch: pytest.MonkeyPatch, selected: list[Tensor]) -> None:
    """Without a residual stream there is nothing to prune: it runs dense, as with mamba_ssm's reference functions."""
    model, _ = models(layer, fused=False)
    mixer = model.backbone.layers[0].mixer
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        ours = simba(mixer, **PRUNED)(x)
        reference = selective_scan_interface.selective_scan_ref
        for module in (mamba_simple, selective_scan_interface):
            monkeypatch.setattr(module, "selective_scan_fn", reference)
        monkeypatch.setattr(layernorm_gated, "rmsnorm_fn", layernorm_gated.rms_norm_ref)
        monkeypatch.setattr(
            mamba2,
            "mamba_chunk_scan_combined",
            lambda *args, chunk_size, seq_idx, cu_seqlens, return_final_states, return_varlen_states, **kwargs: (
                ssd_combined.ssd_selective_scan(*args, **kwargs)
            ),
        )
        close(ours, mixer(x), 1e-5)  # these compute in float32
    assert not selected


# --- what stands in a function's place ----------------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same(actual: Any, expected: Any) -> None:
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_selective_scan(grouped: bool) -> None:
    x, A, B = numbers(2, 6, 9), -numbers(6, 3).exp(), numbers(2, 3, 9)
    B = B[:, None] if grouped else B
    given = {"D": numbers(6), "z": x.roll(1, 1), "delta_bias": numbers(6), "delta_softplus": True, "return_last_state": True}
    expected = selective_scan_interface.selective_scan_ref(x, x.cos(), A, B, B.cos(), **given)
    assert_same(substitutes.selective_scan_fn(x, x.cos(), A, B, B.cos(), **given), expected)


def test_whole_mamba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan_interface, "causal_conv1d_fn", causal_conv1d_fn)
    monkeypatch.setattr(selective_scan_interface, "selective_scan_fn", selective_scan_interface.selective_scan_ref)
    weights = numbers(6, 1, 4), numbers(6), numbers(2 + 2 * 3, 6), numbers(6, 2), numbers(5, 6), numbers(5)
    args = numbers(2, 12, 9), *weights, -numbers(6, 3).exp(), None, None, numbers(6), numbers(7)[1:]
    assert_same(substitutes.mamba_inner_fn(*args), selective_scan_interface.mamba_inner_ref(*args))
    assert substitutes.mamba_inner_fn(*args, b_rms_weight=numbers(3)) is NotImplemented


@pytest.mark.parametrize("heads", [(), (4,)])
def test_selective_state_update(heads: tuple[int, ...]) -> None:
    x, dt, bias, D = numbers(2, *heads, 6), numbers(2, *heads, 6), numbers(*heads, 6), numbers(*heads, 6)
    A, B = -numbers(*heads, 6, 3).exp(), numbers(2, *[2 for _ in heads], 3)
    if heads:  # mamba_ssm repeats a head's numbers for its channels
        A, dt, bias, D = A[:, :1, :1].expand(A.shape), *(value[..., :1].expand(value.shape) for value in (dt, bias, D))
    state = numbers(2, *heads, 6, 3)
    ours, theirs = state.clone(), state.clone()
    given = {"D": D, "z": x.cos(), "dt_bias": bias, "dt_softplus": True}
    expected = selective_state_update.selective_state_update_ref(theirs, x, dt, A, B, B.cos(), **given)
    assert_same((substitutes.selective_state_update(ours, x, dt, A, B, B.cos(), **given), ours), (expected, theirs))


@pytest.mark.parametrize("skip", [(4,), (4, 6)])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.9)])
def test_chunk_scan(skip: tuple[int, ...], limit: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan_interface, "selective_scan_fn", selective_scan_interface.selective_scan_ref)
    x, dt, A, B = numbers(2, 9, 4, 6), numbers(2, 9, 4), -numbers(4).exp(), numbers(2, 9, 2, 3)
    given = {"D": numbers(*skip), "z": x.sin(), "dt_bias": numbers(4), "dt_softplus": True, "dt_limit": limit}
    expected = ssd_combined.ssd_selective_scan(x, dt, A, B, B.cos(), **given)
    assert_same(substitutes.mamba_chunk_scan_combined(x, dt, A, B, B.cos(), 4, **given), expected)
    padding = {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)}
    assert substitutes.mamba_chunk_scan_combined(x, dt, A, B, B, 4, **padding) is NotImplemented


@pytest.mark.parametrize("normed", [False, True])
def test_whole_mamba2(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_combined, "causal_conv1d_fn", causal_conv1d_fn, raising=False)
    monkeypatch.setattr(selective_scan_interface, "selective_scan_fn", selective_scan_interface.selective_scan_ref)
    monkeypatch.setattr(ssd_combined, "rmsnorm_fn", layernorm_gated.rms_norm_ref)
    heads, size, states = 4, 6, 3
    width = heads * size + 2 * states
    given: dict[str, Any] = {"dt_limit": (0.1, 0.9), "outproj_weight": numbers(5, heads * size), "headdim": size}
    if normed:
        given |= {"rmsnorm_weight": numbers(heads * size), "norm_before_gate": False}
    z_to_dt = numbers(2, 9, heads * size + width + heads)
    args = z_to_dt, numbers(width, 4), numbers(width), numbers(heads), -numbers(heads).exp(), numbers(heads), 4
    assert_same(
        substitutes.mamba_split_conv1d_scan_combined(*args, **given),
        ssd_combined.mamba_split_conv1d_scan_ref(*args, **given),
    )


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("residual", [None, numbers(2, 9, 6).sin()], ids=["first", "residual"])
def test_norm_between_layers(norm: str, residual: Tensor | None) -> None:
    args = numbers(2, 9, 6), numbers(6), numbers(7)[1:]
    given = {"residual": residual, "eps": 1e-5, "prenorm": True}
    assert_same(getattr(substitutes, f"{norm}_fn")(*args, **given), getattr(layer_norm, f"{norm}_ref")(*args, **given))
    assert substitutes.layer_norm_fn(*args, dropout_p=0.1) is NotImplemented


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 3])
def test_gated_norm(before: bool, group: int | None) -> None:
    x, weight = numbers(2, 9, 6), numbers(6)
    given = {"z": x.cos(), "eps": 1e-5, "group_size": group, "norm_before_gate": before}
    assert_same(substitutes.rmsnorm_fn(x, weight, None, **given), layernorm_gated.rms_norm_ref(x, weight, None, **given))

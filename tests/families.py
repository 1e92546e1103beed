"""A tiny model of every Mamba-based family in transformers, built from its configuration class.

The table is all there is to a family here. Sizes are small and unequal where they can be, so that a confusion of two
axes shows; weights are so spread that tokens differ in their influence, attention in its targets and routers in their
experts. In float64 the models compute in float64 all through, but for what `exact` and `Family.routes` say.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, ExactNorm
from torch import Tensor, nn

HIDDEN = 32
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model.

    Attributes
    ----------
    name : str
        Of its classes: ``<name>Config`` and ``<name>ForCausalLM``.
    fields : dict
        Of its configuration.
    attends : bool
        It has attention layers.
    routes : bool
        It has mixtures of experts. Their routers compute in float32, in a float64 model too.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    attends: bool = False
    routes: bool = False


_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
_MAMBA2 = {  # in the words of Bamba, GraniteMoeHybrid and FalconH1
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 16,
}

FAMILIES: dict[str, Family] = {
    "mamba": Family("Mamba", {"num_hidden_layers": 3, "state_size": 6}),
    "falcon_mamba": Family("FalconMamba", {"num_hidden_layers": 3, "state_size": 6}),
    "mamba2": Family(
        "Mamba2",
        {
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 6,
            "chunk_size": 16,
            "time_step_limit": (0.03, 0.3),
            "tie_word_embeddings": True,
        },
    ),
    "codestral": Family(  # the proportions of Mamba-Codestral-7B: eight groups, as many states as twice a head's size
        "Mamba2",
        {
            "num_hidden_layers": 3,
            "num_heads": 16,
            "head_dim": 4,
            "n_groups": 8,
            "state_size": 8,
            "chunk_size": 16,
            "use_bias": False,
            "tie_word_embeddings": False,
        },
    ),
    "jamba": Family(  # attention is without positions
        "Jamba",
        {
            **_ATTENTION,
            "num_hidden_layers": 5,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 6,
            "mamba_dt_rank": 4,
        },
        attends=True,
        routes=True,
    ),
    "zamba": Family(  # no positions; the shared block reads the embedding again; two Mamba heads
        "Zamba",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 2,
            "mamba_d_state": 6,
            "mamba_dt_rank": 4,
        },
        attends=True,
    ),
    "zamba2": Family(  # two shared blocks with adapters and rotary positions
        "Zamba2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"],
            "num_mem_blocks": 2,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 6,
            "chunk_size": 16,
            "time_step_min": 0.03,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
        },
        attends=True,
    ),
    "bamba": Family("Bamba", {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 5, "attn_layer_indices": [1, 3]}, attends=True),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {
            **_ATTENTION,
            **_MAMBA2,
            "num_hidden_layers": 5,
            "layer_types": ["mamba", "attention", "mamba", "attention", "mamba"],
            "position_embedding_type": "rope",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
        attends=True,
        routes=True,
    ),
    "falcon_h1": Family(  # attention and Mamba side by side in every layer
        "FalconH1",
        {
            **_ATTENTION,
            **_MAMBA2,
            "num_hidden_layers": 3,
            "mamba_d_ssm": 64,
            "embedding_multiplier": 1.2,
            "lm_head_multiplier": 0.8,
            "key_multiplier": 0.9,
            "attention_in_multiplier": 1.1,
            "attention_out_multiplier": 0.7,
            "ssm_in_multiplier": 0.9,
            "ssm_out_multiplier": 0.8,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.9],
            "mlp_multipliers": [0.9, 0.6],
        },
        attends=True,
    ),
    "nemotron_h": Family(  # a layer is a mixer, an attention, an MLP or a mixture of experts; no positions
        "NemotronH",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 40,
            "hybrid_override_pattern": "M*ME-*M",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "chunk_size": 16,
            "time_step_min": 0.03,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
        },
        attends=True,
        routes=True,
    ),
}


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face's eager code run in float64.

    Its casts of activations from float64 to float32 are left out (those of parameters stay), and its experts run one by
    one, as the grouped product that it takes otherwise has no float64.
    """
    cast = Tensor.float

    def keep_wide(x: Tensor) -> Tensor:
        activation = x.dim() >= 3 and x.dtype == torch.float64 and not isinstance(x, nn.Parameter)
        return x if activation else cast(x)

    experts = model.config._experts_implementation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", keep_wide)
        if experts == "grouped_mm":
            model.set_experts_implementation("eager")
        try:
            yield
        finally:
            if experts == "grouped_mm":
                model.set_experts_implementation(experts)


def _spread(name: str, value: Tensor) -> None:
    """Draw a parameter anew, by its place in the model."""
    leaf = name.rpartition("norm")[2] if "norm" in name else name
    if leaf.endswith(("A_log", "e_score_correction_bias")):
        value.add_(0.3 * torch.randn_like(value))
    elif leaf.endswith("D"):
        value.normal_()
    elif leaf.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
        value.normal_(mean=-2.5, std=0.7)  # Δ from 0.02 to 0.3: far tokens still count
    elif "norm" in name:
        value.add_(0.1 * torch.randn_like(value))
    elif "embed" in name:
        value.normal_()
    elif "conv1d" in name:
        value.normal_(std=0.5)
    elif "dt_proj" in name:
        value.normal_(std=0.4)
    elif "x_proj" in name:
        value.normal_(std=0.8 / math.sqrt(value.shape[-1]))
    elif "q_proj" in name or "k_proj" in name or "adapter" in name:
        value.normal_(std=0.9 / math.sqrt(value.shape[-1]))
    elif "out_proj" in name:
        value.normal_(std=1.2 / math.sqrt(value.shape[-1]))
    elif value.dim() >= 2:
        value.normal_(std=1.7 / math.sqrt(value.shape[-1]))


def spread_weights(model: nn.Module) -> None:
    """Draw all parameters anew, as the top of this file says."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            _spread(name, value)


def compute_exactly(model: nn.Module) -> None:
    """Have a model's norms compute in their input's own type: `ExactNorm`."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if "norm" in name and not isinstance(child, nn.Identity):
                setattr(module, name, ExactNorm(child))


def configuration(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> transformers.PreTrainedConfig:
    """The configuration of a family's tiny model, and further fields."""
    entry = FAMILIES[family]
    fields = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, **SPECIAL_TOKENS, **entry.fields}
    if entry.name in ("Mamba", "FalconMamba", "Mamba2"):
        fields["residual_in_fp32"] = dtype != torch.float64
    return getattr(transformers, f"{entry.name}Config")(**{**fields, **config})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> nn.Module:
    """Build a tiny model of a family, in eval mode.

    Parameters
    ----------
    family : str
        A key of `FAMILIES`.
    dtype : torch.dtype
        Of its weights. In float64 its norms are `ExactNorm`.
    seed : int
        What its weights are drawn from.
    **config
        Further fields of its configuration.
    """
    torch.manual_seed(seed)
    model = getattr(transformers, f"{FAMILIES[family].name}ForCausalLM")(configuration(family, dtype, **config)).eval()
    spread_weights(model)
    with torch.no_grad():
        # Hugging Face records hidden states by hooks, and Dynamo cannot trace how it installs them at the first such call.
        model(torch.tensor([[1]]), output_hidden_states=True)
    if dtype == torch.float64:
        compute_exactly(model)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.float()  # the angles of positions are float32 in every type of weights
    return model

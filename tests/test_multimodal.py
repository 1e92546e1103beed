"""Multimodal models of transformers whose text backbone is a Mamba-based one: pruned like the backbone alone.

The embeddings that the whole model hands to its backbone, those of images and sound among them, are what `family_reference`
starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, close, original_places, random_ids, simba
from families import compute_exactly, configuration, exact, spread_weights
from family_reference import pruned_forward
from torch import Tensor, nn

PRUNED: dict[str, Any] = {"keep": 0.3, "min_tokens": 4}
LENGTH = 40
MEDIUM = VOCABULARY - 1  # the token in whose place an image or a sound stands
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def backbone_of(family: str) -> transformers.PreTrainedConfig:
    """A text backbone's configuration. FalconH1 scales the embeddings that it looks up, and not those that it is given."""
    return configuration(family, **({"embedding_multiplier": 1.0} if family == "falcon_h1" else {}))


def llava(family: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """Any text backbone behind a CLIP tower."""
    vision = transformers.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, image_size=16, patch_size=4)
    config = transformers.LlavaConfig(vision_config=vision, text_config=backbone_of(family), image_token_index=MEDIUM)
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(2, 3, 16, 16)}, 16


def nemotron_h_omni(family: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """NemotronH behind RADIO."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": 4}
    vision |= {"image_size": 16, "max_img_size": 32, "num_cls_tokens": 1, "num_registers": 1, "model_type": "radio"}
    config = transformers.AutoConfig.for_model(
        "nemotron_h_omni",
        text_config=backbone_of(family).to_dict(),
        vision_config=vision | {"video_temporal_patch_size": 2},
        vision_hidden_size=16,
        projector_hidden_size=24,
        image_token_id=MEDIUM,
    )
    pixels = {"pixel_values": torch.randn(2 * 16, 3 * 16), "image_grid_hw": torch.tensor([[4, 4], [4, 4]])}
    return transformers.NemotronH_Omni_Reasoning_V3(config), pixels, 4


def granite_speech(family: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """GraniteMoeHybrid behind a conformer and a Q-Former."""
    encoder = {"input_dim": 8, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "context_size": 15}
    encoder |= {"output_dim": 8, "conv_kernel_size": 3, "max_pos_emb": 16}
    projector = transformers.Blip2QFormerConfig(**TOWER, encoder_hidden_size=16)
    config = transformers.GraniteSpeechConfig(
        text_config=backbone_of(family),
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=MEDIUM,
        has_lora_adapter=False,
        window_size=15,
        downsample_rate=5,
    )
    return transformers.GraniteSpeechForConditionalGeneration(config), {"input_features": torch.randn(2, 15, 8)}, 3


def nemotron3_5_transcribe(family: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """NemotronH behind an encoder of speech and a model that tells speakers apart."""
    tower = {**TOWER, "num_mel_bins": 8}
    speakers = {"head_config": {"hidden_size": 16, "audio_hidden_size": 16, "num_speakers": 2}, "audio_config": tower}
    speakers |= {"model_type": "nemotron3_diarization", "streaming_config": {"num_speakers": 2}}
    config = transformers.AutoConfig.for_model(
        "nemo_speechlm",
        text_config=backbone_of(family).to_dict(),
        audio_config={"asr_config": tower, "diarization_config": speakers},
        word_timestamp_config={**TOWER, "vocab_size": 9, "blank_token_id": 8},
        audio_token_id=MEDIUM,
    )
    sound = {"input_features": torch.randn(2, 24, 8), "input_features_mask": torch.ones(2, 24, dtype=torch.long)}
    return transformers.Nemotron3_5TranscribeForConditionalGeneration(config), sound, 3


MODELS: dict[str, tuple[Callable[[str], tuple[nn.Module, dict[str, Tensor], int]], str]] = {
    "nemotron_h_omni": (nemotron_h_omni, "nemotron_h"),
    "nemotron3_5_transcribe": (nemotron3_5_transcribe, "nemotron_h"),
    "granite_speech": (granite_speech, "granitemoehybrid"),
    "llava-bamba": (llava, "bamba"),
    "llava-falcon_h1": (llava, "falcon_h1"),
    "llava-jamba": (llava, "jamba"),
    "llava-zamba2": (llava, "zamba2"),
}


class Given(nn.Module):
    """In the place of an embedding: what it shall return."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding


# Without a medium the graphs are the same but for where it goes in: two models show that.
@pytest.mark.parametrize(
    ("name", "with_medium"), [*((name, True) for name in MODELS), ("nemotron_h_omni", False), ("llava-bamba", False)]
)
def test_a_prompt(name: str, with_medium: bool, selected: list[Tensor]) -> None:
    build, family = MODELS[name]
    torch.manual_seed(0)
    model, medium, places = build(family)
    spread_weights(model)
    backbone = model.language_model if hasattr(model, "language_model") else model.model.language_model
    compute_exactly(backbone)
    model.double().eval()
    ids = random_ids(2, LENGTH).clamp(max=MEDIUM - 1)
    given: dict[str, Tensor] = {}
    if with_medium:
        given = {key: value.double() if value.is_floating_point() else value for key, value in medium.items()}
        ids[:, 5 : 5 + places] = MEDIUM

    seen: list[Tensor] = []
    hook = backbone.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad(), exact(backbone):
        dense = model(input_ids=ids, **given).logits
    hook.remove()

    text = transformers.AutoModelForCausalLM.from_config(backbone_of(family))
    compute_exactly(text)
    text.double().eval()
    whole = hasattr(backbone, "lm_head")
    (text if whole else text.base_model).load_state_dict(backbone.state_dict())
    text.base_model.set_input_embeddings(Given(seen[0]))
    with torch.no_grad():
        logits = simba(model, fullgraph=False, **PRUNED)(input_ids=ids, **given).logits
        with exact(text):
            everything, expected = pruned_forward(text, ids, keep=1.0), pruned_forward(text, ids, **PRUNED)
        for actual, run in ((dense, everything), (logits, expected)):
            close(actual, run.logits if whole else model.lm_head(run.hidden_states[-1]), 1e-5)
    assert original_places(selected, LENGTH) == [kept.tolist() for kept in expected.kept[1:]]

"""Models that the commands run."""

from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, Cache, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

MAMBA_130M: dict[str, Any] = {"hidden_size": 768, "state_size": 16, "vocab_size": 50280}
TINY: dict[str, Any] = {"hidden_size": 64, "state_size": 16, "vocab_size": 256}


def quiet() -> None:
    """Have transformers say nothing about its missing GPU kernels, and show no bars of its own beside ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def random_mamba(layers: int, sizes: dict[str, Any]) -> MambaForCausalLM:
    """A Mamba with random weights, the same ones each time."""
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(num_hidden_layers=layers, **sizes)).eval()


def random_ids(vocabulary: int, tokens: int) -> torch.Tensor:
    """A random prompt, (1, tokens), the same one each time."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def going_on(output: ModelOutput) -> dict[str, Cache]:
    """The cache that a model returned, as the argument of its next call: since transformers 5.24 its name is `cache`."""
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
    return {name: output[name]}


def load_bytes(folder: Path) -> PreTrainedModel:
    """A byte-level model from a folder, in float32.

    Raises
    ------
    typer.BadParameter
        Where there is none.
    """
    if not (folder / "config.json").is_file():
        raise typer.BadParameter(
            f"there is no model in {folder} (no config.json). The repository of simba_compile carries one in "
            "models/python-bytes: run this from the repository's root, or name the folder.",
            param_hint="--model",
        )
    model = load(str(folder), config_only=False, dtype=torch.float32)
    if model.config.vocab_size != 256:
        raise typer.BadParameter(
            f"{folder} has a vocabulary of {model.config.vocab_size}; the demo reads bytes, and needs one of 256.",
            param_hint="--model",
        )
    return model


def load(name: str, config_only: bool, dtype: Any = "auto", option: str = "model") -> PreTrainedModel:
    """A model from a folder or the Hub; with random weights, in its own type, if only its configuration is to be read.

    Raises
    ------
    typer.BadParameter
        Where it cannot be loaded, with the reason that transformers gives; for the command's `option`.
    """
    is_path = name.startswith(("/", ".", "~")) or name.endswith("/")
    if is_path and not Path(name).is_dir():  # transformers would take it for a name on the Hub
        raise typer.BadParameter(f"{name} cannot be loaded: there is no such folder.", param_hint=option)
    try:
        if config_only:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)).eval()
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError, SafetensorError) as error:  # the last: a pointer of Git LFS, or half of a file
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"{name} cannot be loaded: {reason}", param_hint=option) from None

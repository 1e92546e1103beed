"""How alike the states of adjacent tokens are, layer by layer (the paper's Figure 2)."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from simba_compile.analysis.variants import Scan, record_scans
from simba_compile.kernels.reference import step_size
from simba_compile.options import Options


STRIDE = 8


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Mean cosine similarities in one layer.

    Attributes
    ----------
    adjacent : float
        Of a token's value with the one before it.
    unrelated : float
        Of a token's value with that of the token at the same place in another window: what adjacent tokens have in common
        with any token at all.
    """

    adjacent: float
    unrelated: float


def measure(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Any]]:
    """Compare tokens in every layer of the dense model.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a family that the backend lifts.
    ids : Tensor
        (windows, tokens), at least two windows.

    Returns
    -------
    list of dict
        For each mixer "layer", from 1; "ssm_state", a `Similarity` of the scan's state h_t, and "hidden_state", one of the
        residual stream after the layer, both as data.
    """
    scans, output = record_scans(model, ids, Options(keep=1.0), output_hidden_states=True, logits_to_keep=1)
    # Before the first layer, after each, and the last once more, normed.
    streams = output.hidden_states[: len(scans)]
    return [
        {
            "layer": i + 1,
            "ssm_state": dataclasses.asdict(state_similarity(scan)),
            "hidden_state": dataclasses.asdict(similarity(stream)),
        }
        for i, (scan, stream) in enumerate(zip(scans, streams, strict=True))
    ]


def similarity(values: Tensor) -> Similarity:
    """`Similarity` of values at every token, (windows, tokens, channels)."""
    values = values.float()
    adjacent = F.cosine_similarity(values[:, 1:], values[:, :-1], dim=-1)
    unrelated = F.cosine_similarity(values[:, 1:], values[:, 1:].roll(1, 0), dim=-1)
    return Similarity(adjacent.mean().item(), unrelated.mean().item())


def state_similarity(scan: Scan) -> Similarity:
    """`Similarity` of a scan's states, each of channels × state numbers, at every `STRIDE`-th token.

    Walked token by token: all states at once would not fit.
    """
    given = scan.arguments
    delta = step_size(given["dt"], given["dt_bias"], given["softplus"])
    u, A, B = (given[name].to(delta.dtype) for name in ("x", "A", "B"))
    state = torch.zeros(u.shape[0], u.shape[2], A.shape[1])
    adjacent, unrelated = [], []
    for t in range(u.shape[1]):
        before = state
        entering = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        state = torch.exp(delta[:, t, :, None] * A) * before + entering
        if t % STRIDE == STRIDE - 1:
            flat = state.flatten(1)
            adjacent.append(F.cosine_similarity(flat, before.flatten(1), dim=1).mean())
            unrelated.append(F.cosine_similarity(flat, flat.roll(1, 0), dim=1).mean())
    return Similarity(torch.stack(adjacent).mean().item(), torch.stack(unrelated).mean().item())

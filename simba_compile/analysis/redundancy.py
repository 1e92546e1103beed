"""How alike the states of adjacent tokens are, layer by layer (the paper's Figure 2)."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from simba_compile.analysis.variants import ScanRead, record_scans
from simba_compile.kernels.reference import scan_states, ssd_states, ssd_step_size, step_size
from simba_compile.options import Options
from simba_compile.passes.scans import MAMBA1

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


def measure(model: PreTrainedModel, ids: Tensor) -> dict[str, list[dict[str, float]]]:
    """Compare tokens in every layer of the dense model.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a family that the backend lifts.
    ids : Tensor
        (windows, tokens), at least two windows of `STRIDE` tokens.

    Returns
    -------
    dict of str to list of dict
        "ssm_states": for each scan, the `Similarity` of its states h_t as data; "hidden_states": for each layer, that of the
        residual stream after it (after the last one, normed, as transformers returns it). A hybrid has more layers than
        scans.

    Raises
    ------
    ValueError
        For fewer windows or tokens, and for a model in which no scan is found.
    """
    if ids.shape[0] < 2 or ids.shape[1] < STRIDE:
        raise ValueError(
            f"the text gives {ids.shape[0]} window(s) of {ids.shape[1]} tokens; at least 2 of {STRIDE} are needed: states "
            f"are compared at every {STRIDE}-th token, and between windows."
        )
    scans, output = record_scans(model, ids, Options(keep=1.0), output_hidden_states=True, logits_to_keep=1)
    return {
        "ssm_states": [dataclasses.asdict(state_similarity(scan)) for scan in scans],
        "hidden_states": [dataclasses.asdict(similarity(stream)) for stream in output.hidden_states[1:]],
    }


def similarity(values: Tensor) -> Similarity:
    """`Similarity` of values at every token, (windows, tokens, channels)."""
    values = values.float()
    adjacent = F.cosine_similarity(values[:, 1:], values[:, :-1], dim=-1)
    unrelated = F.cosine_similarity(values[:, 1:], values[:, 1:].roll(1, 0), dim=-1)
    return Similarity(adjacent.mean().item(), unrelated.mean().item())


def state_similarity(scan: ScanRead) -> Similarity:
    """`Similarity` of a scan's states, each of channels × state numbers, at every `STRIDE`-th token.

    Walked token by token: all states at once would not fit.
    """
    states = _states(scan)
    before = next(states)
    adjacent, unrelated = [], []
    for t, state in enumerate(states):
        if t % STRIDE == STRIDE - 1:
            flat = state.flatten(1)
            adjacent.append(F.cosine_similarity(flat, before.flatten(1), dim=1).mean())
            unrelated.append(F.cosine_similarity(flat, flat.roll(1, 0), dim=1).mean())
        before = state
    return Similarity(torch.stack(adjacent).mean().item(), torch.stack(unrelated).mean().item())


def _states(scan: ScanRead) -> Iterator[Tensor]:
    """The scan's state before the first token and after each: (batch, channel or head and its channels, state)."""
    given = scan.arguments
    if scan.kind is MAMBA1:
        delta = step_size(given["dt"], given["dt_bias"], given["softplus"])
    else:
        delta = ssd_step_size(given["dt"], given["dt_bias"], given["softplus"], (given["dt_min"], given["dt_max"]))
    u, A, B = (given[name].to(delta.dtype) for name in ("x", "A", "B"))
    return scan_states(delta, u, A, B) if scan.kind is MAMBA1 else ssd_states(delta, u, A, B)

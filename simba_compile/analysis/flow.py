"""How much of every token reaches a layer's last output: normalised influence by position (the paper's Figure 5)."""

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simba_compile.analysis.variants import ScanRead, record_scans
from simba_compile.options import Options


def measure(
    model: PreTrainedModel, ids: Tensor, options: Options, layers: Sequence[int] | None, bins: int
) -> list[dict[str, Any]]:
    """Compare the flow of the dense model with that of the pruned one.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a family that the backend lifts.
    ids : Tensor
        (windows, tokens).
    options : Options
        Of the pruned model; their pool and dt_bias are those of the influence.
    layers : sequence of int, optional
        Which mixers, from 1; all of them unless given.
    bins : int
        How many equal parts of the sequence the curves have.

    Returns
    -------
    list of dict
        For each layer "layer", from 1; "tokens", how many its scan runs on when pruned; and the `curve` of "dense", "pruned"
        and "dense_same_tokens", which is the dense model's at the tokens that the pruned one has in this layer: that the
        pruned curve is higher than "dense" may come from having kept tokens that are high anyway, that it is higher than
        "dense_same_tokens" cannot.

    Raises
    ------
    ValueError
        For a layer that the model does not have.
    """
    dense, _ = record_scans(model, ids, Options(keep=1.0), logits_to_keep=1)
    pruned, _ = record_scans(model, ids, options, logits_to_keep=1)
    chosen = range(1, len(dense) + 1) if layers is None else layers
    if not all(1 <= layer <= len(dense) for layer in chosen):
        raise ValueError(f"layers {list(chosen)} were asked for; the model has mixers 1 to {len(dense)}.")
    tokens = ids.shape[1]
    found = []
    for layer in chosen:
        full, few = dense[layer - 1], pruned[layer - 1]
        flow = normalised_influence(full, options)
        found.append(
            {
                "layer": layer,
                "tokens": few.positions.shape[1],
                "dense": curve(flow, full.positions, tokens, bins),
                "pruned": curve(normalised_influence(few, options), few.positions, tokens, bins),
                "dense_same_tokens": curve(flow.gather(1, few.positions), few.positions, tokens, bins),
            }
        )
    return found


def normalised_influence(scan: ScanRead, options: Options) -> Tensor:
    """s(t) / ‖y_T‖ of every token that a scan reads.

    s(t) is the influence pooled over channels as the options say, y_T the scan's last output without skip and gate: the sum
    of what all tokens add to it.

    Returns
    -------
    Tensor
        (batch, token) in float64.
    """
    kind, given = scan.kind, scan.arguments
    score = kind.influence(*(given[name] for name in kind.scored), options.pool, options.dt_bias == "include")
    plain = given | {"D": None, "z": None}
    _, state = kind.operator(*(plain[name] for name in kind.arguments))
    C = given["C"][:, -1].double()  # (batch, state), or (batch, group, state) with a group for several heads
    C = C[:, None] if C.dim() == 2 else C.repeat_interleave(state.shape[1] // C.shape[1], 1)[:, :, None]
    last = (state.double() * C).sum(-1).flatten(1)
    return score.exp() / last.norm(dim=1, keepdim=True)


def curve(flow: Tensor, positions: Tensor, tokens: int, bins: int) -> list[float | None]:
    """The mean of a flow, (batch, token), over the tokens in each part of the sequence; None where there are none."""
    part = positions * bins // tokens
    means = [flow[part == i] for i in range(bins)]
    return [mean.mean().item() if mean.numel() else None for mean in means]


def reach(points: Sequence[float | None]) -> float | None:
    """How flat a curve is: the geometric mean of its first half over that of its last tenth; 1 is flat.

    Parts without tokens are left out; None where the first half has none.
    """
    half, tenth = max(1, len(points) // 2), max(1, len(points) // 10)
    early, late = ([point for point in part if point] for part in (points[:half], points[-tenth:]))
    return statistics.geometric_mean(early) / statistics.geometric_mean(late) if early and late else None

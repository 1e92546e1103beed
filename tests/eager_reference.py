"""The method (docs/method.md; "the contract" in tests) in plain eager PyTorch: what the compiler is tested against.

Nothing here is compiled, fused or shared with ``simba_compile``. Every step is written out, module by module, for
Hugging Face's ``MambaForCausalLM`` and ``FalconMambaForCausalLM``, with the casts of their own eager code, so that
``keep=1.0`` equals it to rounding. Sequences are laid out channels last: (batch, tokens, channels). Gradients flow
through the tokens that stay; the choice of tokens has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Reference:
    """What a pruned forward pass produces.

    Attributes
    ----------
    logits : Tensor
        Shape (batch, T, vocab), or (batch, logits_to_keep, vocab); float32, as in Hugging Face.
    hidden_states : list of Tensor
        What ``output_hidden_states=True`` returns: one (batch, T, hidden) after each block and one after the final
        norm. A token that has left shows the value that it had on leaving.
    kept : list of Tensor
        For each mixer, shape (batch, n_l), int64: the original positions that remain after it, ascending.
    conv_states : list of Tensor
        For each mixer, shape (batch, intermediate, conv_kernel): the last inputs of the convolution, over the tokens
        that entered the mixer, padded with zeros on the left.
    ssm_states : list of Tensor
        For each mixer, shape (batch, intermediate, state): the state after the scan, over the tokens that stay for
        placement "scan" and over those that entered for placement "layer".
    """

    logits: Tensor
    hidden_states: list[Tensor]
    kept: list[Tensor]
    conv_states: list[Tensor]
    ssm_states: list[Tensor]


def counts(
    T: int,
    n_mixers: int,
    *,
    keep: float = 0.1,
    schedule: str | Sequence[float] = "linear",
    every: int = 1,
    min_tokens: int = 32,
    protect_first: int = 0,
    protect_last: int = 1,
) -> list[int]:
    """How many tokens stay after each mixer (1.2)."""
    fewest = min(T, max(min_tokens, protect_first + protect_last))
    sizes: list[int] = []
    before = T
    for mixer in range(n_mixers):
        step = every * (mixer // every)
        if schedule == "linear":
            ratio = keep if n_mixers == 1 else 1 - (1 - keep) * step / (n_mixers - 1)
        elif schedule == "uniform":
            ratio = keep
        elif isinstance(schedule, str) or len(schedule) != n_mixers:
            raise ValueError(f"schedule is {schedule!r}, not 'linear', 'uniform' or {n_mixers} ratios")
        else:
            ratio = schedule[step]
        wanted = (round(ratio * 2**20) * T + 2**19) // 2**20
        before = min(max(wanted, fewest), before)
        sizes.append(before)
    return sizes


def _scaled_contributions(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_last: Tensor, delta_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``m`` and ``scaled``, both (batch, T, D), such that each token's part in y_T is ``exp(m) * scaled``."""
    decay = delta if delta_decay is None else delta_decay
    from_here_on = decay.flip(1).cumsum(1).flip(1)
    after = torch.cat([from_here_on[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)  # S_t, the sum over k > t
    exponent = A * after[..., None]
    m = exponent.amax(-1)
    per_state = C_last[:, None, None, :] * B[:, :, None, :] * torch.exp(exponent - m[..., None])
    return m, x * delta * per_state.sum(-1)


def contributions(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_last: Tensor, delta_decay: Tensor | None = None
) -> Tensor:
    """Compute the part of each token in the last output of the scan, Δy_T(t)[d] of 1.1.

    Parameters
    ----------
    x, delta : Tensor
        Shape (batch, T, D): inputs and step sizes Δ of the scan.
    A : Tensor
        Shape (D, N).
    B : Tensor
        Shape (batch, T, N).
    C_last : Tensor
        Shape (batch, N): C of the last token.
    delta_decay : Tensor, optional
        Shape (batch, T, D): what S_t sums, where that is not ``delta``.

    Returns
    -------
    Tensor
        Shape (batch, T, D).
    """
    m, scaled = _scaled_contributions(x, delta, A, B, C_last, delta_decay)
    return torch.exp(m) * scaled


def influence(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C_last: Tensor,
    delta_decay: Tensor | None = None,
    pool: str = "max",
) -> Tensor:
    """Score each token by its pooled part in the last output (1.1), as a logarithm.

    Parameters are those of `contributions`; ``pool`` is "max" (over the channels with a positive part; -inf without
    one), "absmax" or "l2".

    Returns
    -------
    Tensor
        Shape (batch, T).
    """
    m, scaled = _scaled_contributions(x, delta, A, B, C_last, delta_decay)
    log_size = m + scaled.abs().log()
    if pool == "max":
        return log_size.masked_fill(scaled <= 0, -math.inf).amax(-1)  # NaN <= 0 is false: NaN stays NaN
    if pool == "absmax":
        return log_size.amax(-1)
    if pool == "l2":
        return torch.logsumexp(2 * log_size, dim=-1) / 2
    raise ValueError(f"pool is {pool!r}, not 'max', 'absmax' or 'l2'")


def select(scores: Tensor, k: int, protect_first: int, protect_last: int) -> Tensor:
    """Choose the k best tokens of each sequence (1.3).

    Protected ends come before all others, then NaN, then higher scores, then later tokens.

    Parameters
    ----------
    scores : Tensor
        Shape (batch, n).
    k : int
        How many tokens stay.
    protect_first, protect_last : int
        Lengths of the ends that always stay; together at most k.

    Returns
    -------
    Tensor
        Shape (batch, k), int64: indices in ascending order.
    """
    n = scores.shape[1]
    ends = {*range(protect_first), *range(n - protect_last, n)}
    chosen = []
    for row in scores.tolist():
        ranks = [(t in ends, math.isnan(score), 0.0 if math.isnan(score) else score, t) for t, score in enumerate(row)]
        chosen.append(sorted(t for *_, t in sorted(ranks, reverse=True)[:k]))
    return torch.tensor(chosen, dtype=torch.int64, device=scores.device)


@dataclass
class _ScanInputs:
    """What a mixer computes of each token ahead of its scan: ``channels`` enters the convolution and ``x`` the scan."""

    channels: Tensor
    gate: Tensor
    x: Tensor
    delta: Tensor
    delta_without_bias: Tensor
    B: Tensor
    C: Tensor

    def take(self, index: Tensor) -> _ScanInputs:
        """Keep only the tokens at ``index``, shape (batch, k)."""
        return _ScanInputs(**{name: _take(value, index) for name, value in vars(self).items()})


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Take from each sequence in ``values``, shape (batch, n, ...), the entries at its ``index``, shape (batch, k)."""
    return torch.stack([row[chosen] for row, chosen in zip(values, index, strict=True)])


def _decay_rates(mixer: nn.Module) -> Tensor:
    return -torch.exp(mixer.A_log.float())


def _before_scan(mixer: nn.Module, hidden: Tensor, mask: Tensor | None) -> _ScanInputs:
    """Input projection, convolution and the projections to Δ, B and C, on the tokens that enter a mixer."""
    if mask is not None:
        hidden = hidden * mask[:, :, None]
    channels, gate = mixer.in_proj(hidden).chunk(2, dim=-1)

    width, n = mixer.conv_kernel_size, channels.shape[1]
    padded = F.pad(channels, (0, 0, width - 1, 0))
    x = sum(padded[:, tap : tap + n] * mixer.conv1d.weight[:, 0, tap] for tap in range(width))
    if mixer.conv1d.bias is not None:
        x = x + mixer.conv1d.bias
    x = mixer.act(x)
    if mask is not None:
        x = x * mask[:, :, None]

    time_step, B, C = mixer.x_proj(x).split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # FalconMamba
        time_step, B, C = mixer.dt_layernorm(time_step), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = time_step @ mixer.dt_proj.weight.T
    delta = F.softplus(dt + mixer.dt_proj.bias.float().to(dt.dtype))
    return _ScanInputs(channels, gate, x, delta, F.softplus(dt), B, C)


def _scan_and_after(mixer: nn.Module, inputs: _ScanInputs) -> tuple[Tensor, Tensor]:
    """Scan, D skip, gate and output projection; returns the mixer's output and the last state."""
    A = _decay_rates(mixer)
    batch, n, width = inputs.x.shape
    state = inputs.x.new_zeros(batch, width, A.shape[1])
    outputs = []
    for t in range(n):
        delta = inputs.delta[:, t, :, None]
        step_in = delta * inputs.B[:, t, None, :].float() * inputs.x[:, t, :, None].float()
        state = torch.exp(A * delta) * state + step_in
        outputs.append((state @ inputs.C[:, t, :, None])[..., 0])
    y = torch.stack(outputs, dim=1) + inputs.x * mixer.D.float()
    return mixer.out_proj(y * F.silu(inputs.gate)), state


def _scores(mixer: nn.Module, inputs: _ScanInputs, k: int, criterion: str, pool: str, dt_bias: str) -> Tensor:
    """Scores of the tokens that entered a mixer that keeps k of them, shape (batch, n), in float64."""
    batch, n, _ = inputs.x.shape
    if criterion == "influence":
        decay = inputs.delta if dt_bias == "include" else inputs.delta_without_bias
        values = (inputs.x, inputs.delta, _decay_rates(mixer), inputs.B, inputs.C[:, -1], decay)
        return influence(*(value.detach().double() for value in values), pool=pool)
    if criterion == "recent":
        return torch.arange(n, dtype=torch.float64).expand(batch, n)
    if criterion == "uniform":
        evenly_spaced = [((i + 1) * n) // k - 1 for i in range(k)]
        scores = torch.zeros(batch, n, dtype=torch.float64)
        scores[:, evenly_spaced] = 1.0
        return scores
    raise ValueError(f"criterion is {criterion!r}, not 'influence', 'recent' or 'uniform'")


def pruned_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_to_keep: int = 0,
    *,
    keep: float = 0.1,
    schedule: str | Sequence[float] = "linear",
    every: int = 1,
    criterion: str = "influence",
    pool: str = "max",
    dt_bias: str = "include",
    placement: str = "scan",
    protect_first: int = 0,
    protect_last: int = 1,
    min_tokens: int = 32,
) -> Reference:
    """Run a Mamba or FalconMamba language model with its tokens pruned as the contract says.

    Parameters
    ----------
    model : nn.Module
        A ``MambaForCausalLM`` or ``FalconMambaForCausalLM``, in float32 or float64.
    input_ids : Tensor
        Shape (batch, T).
    attention_mask : Tensor, optional
        Shape (batch, T), 0 at the padding on the left.
    logits_to_keep : int
        Where positive, the logits of that many last positions only, which are then protected.
    keep, schedule, every, criterion, pool, dt_bias, placement, protect_first, protect_last, min_tokens
        The options of 1.5. Whatever ``protect_last`` says, the last token stays.
    """
    if dt_bias not in ("include", "exclude") or placement not in ("scan", "layer"):
        raise ValueError(f"unknown dt_bias {dt_bias!r} or placement {placement!r}")
    backbone = model.backbone
    batch, length = input_ids.shape
    protect_last = max(protect_last, logits_to_keep, 1)
    sizes = counts(
        length,
        len(backbone.layers),
        keep=keep,
        schedule=schedule,
        every=every,
        min_tokens=min_tokens,
        protect_first=protect_first,
        protect_last=protect_last,
    )

    hidden = backbone.embeddings(input_ids)  # of the tokens that are still there
    mask = attention_mask
    positions = torch.arange(length, device=input_ids.device).expand(batch, length)
    stream = hidden  # of all tokens, those that left included
    hidden_states, kept, conv_states, ssm_states = [], [], [], []

    for block, size in zip(backbone.layers, sizes, strict=True):
        mixer = block.mixer
        residual = hidden.float() if block.residual_in_fp32 else hidden
        inputs = _before_scan(mixer, block.norm(hidden.to(block.norm.weight.dtype)), mask)
        last_channels = F.pad(inputs.channels.transpose(1, 2), (mixer.conv_kernel_size, 0))
        conv_states.append(last_channels[..., -mixer.conv_kernel_size :])

        index = torch.arange(hidden.shape[1], device=input_ids.device).expand(batch, -1)
        if size < hidden.shape[1]:
            index = select(_scores(mixer, inputs, size, criterion, pool, dt_bias), size, protect_first, protect_last)
        if placement == "scan":
            inputs, residual, positions = inputs.take(index), _take(residual, index), _take(positions, index)

        output, state = _scan_and_after(mixer, inputs)
        ssm_states.append(state)
        hidden = residual + output
        stream = stream.scatter(1, positions[..., None].expand_as(hidden), hidden)

        if placement == "layer":
            hidden, positions = _take(hidden, index), _take(positions, index)
        mask = None if mask is None else _take(mask, index)
        hidden_states.append(stream)
        kept.append(positions)

    final = backbone.norm_f(stream)
    logits = model.lm_head(final[:, -logits_to_keep:].to(model.lm_head.weight.dtype)).float()  # -0 keeps all
    return Reference(logits, [*hidden_states, final], kept, conv_states, ssm_states)

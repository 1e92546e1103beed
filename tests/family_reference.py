"""The method (docs/method.md; "the contract" in tests) in plain eager PyTorch, for every Mamba-based family of transformers.

`eager_reference` writes out Mamba and FalconMamba with all options; this module has all families with the default
placement and criterion. No compiler, no scan kernel and no cache of Hugging Face is used: layers are walked by hand.
What treats each token alone (projections, norms, MLPs, experts, the angles of rotary positions) is Hugging Face's own
module, called on the tokens that are left. What looks along the sequence (convolution, scan, attention) is written out
here, and goes on from what an earlier call left behind, so that prefill and decoding are the same code.

All mixers run one recurrence, over heads h, head channels p and states n:

    state_t[h,p,n] = exp(A[h,p,n] Δ_t[h,p]) state_{t-1}[h,p,n] + Δ_t[h,p] x_t[h,p] B_t[h,n]
    y_t[h,p] = Σ_n C_t[h,n] state_t[h,p,n] + D[h,p] x_t[h,p]

Mamba-1 has one head (Zamba several), all channels of which have an A and Δ of their own; in Mamba-2 A and Δ are
the same for a whole head, and B and C for a group of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from eager_reference import counts, influence, select
from torch import Tensor, nn


@dataclass
class LayerState:
    """What a decoder layer leaves behind for the tokens to come; what it has no use for is None.

    Attributes
    ----------
    conv : Tensor
        Shape (batch, channels, conv_kernel): the convolution's last inputs, over the tokens that entered the mixer.
    ssm : Tensor
        Shape (batch, heads, head channels, state): after the tokens that stayed.
    keys, values : Tensor
        Shape (batch, heads, entries, head size): of the tokens that attention saw, keys after rotation.
    key_places : Tensor
        Shape (batch, entries): their places in the sequence, the prompt's padding counted.
    key_visible : Tensor
        Shape (batch, entries), bool: false for padding.
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    key_places: Tensor | None = None
    key_visible: Tensor | None = None


@dataclass
class Pass:
    """What a forward pass produces.

    Attributes
    ----------
    logits : Tensor
        Shape (batch, T, vocab).
    hidden_states : list of Tensor
        As ``output_hidden_states=True`` returns them. A token that has left shows what it had on leaving.
    kept : list of Tensor
        For each mixer, shape (batch, n_l), int64: the places of the tokens that stay, ascending.
    states : list of LayerState
        For each decoder layer.
    """

    logits: Tensor
    hidden_states: list[Tensor]
    kept: list[Tensor]
    states: list[LayerState]


@dataclass
class _Tokens:
    """What is known of each token that is left: its place, position, whether it is real, and its embedding."""

    places: Tensor
    positions: Tensor
    real: Tensor
    embedding: Tensor

    def take(self, index: Tensor) -> _Tokens:
        return _Tokens(**{name: _take(value, index) for name, value in vars(self).items()})


@dataclass
class _ScanInputs:
    """What a scan reads: x, delta (batch, n, heads, channels); B, C (batch, n, heads, states); A, D without batch, n."""

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor

    def take(self, index: Tensor) -> _ScanInputs:
        of_tokens = {name: _take(getattr(self, name), index) for name in ("x", "delta", "B", "C")}
        return _ScanInputs(**of_tokens, A=self.A, D=self.D)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Take from each sequence in ``values``, shape (batch, n, ...), the entries at its ``index``, shape (batch, k)."""
    return torch.stack([row[chosen] for row, chosen in zip(values, index, strict=True)])


def _scores(inputs: _ScanInputs) -> Tensor:
    """Compute the influence of each token (1.1): the logarithm of its largest part in any channel of any head."""
    x, delta, B, C, A = (value.detach().double() for value in (inputs.x, inputs.delta, inputs.B, inputs.C, inputs.A))
    heads = [influence(x[:, :, h], delta[:, :, h], A[h], B[:, :, h], C[:, -1, h]) for h in range(A.shape[0])]
    return torch.stack(heads).amax(0)


def _scan(inputs: _ScanInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the recurrence, token by token; returns y, (batch, n, heads, channels), and the last state."""
    batch, n, heads, channels = inputs.x.shape
    if state is None:
        state = inputs.x.new_zeros(batch, heads, channels, inputs.B.shape[-1])
    outputs = []
    for t in range(n):
        delta, x, B, C = (value[:, t] for value in (inputs.delta, inputs.x, inputs.B, inputs.C))
        state = torch.exp(inputs.A * delta[..., None]) * state + (delta * x)[..., None] * B[:, :, None]
        outputs.append((state * C[:, :, None]).sum(-1) + inputs.D * x)
    return torch.stack(outputs, dim=1), state


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels, as many as ``cos`` has, by each token's angles; x is (batch, heads, n, head size)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1)


class _Walk:
    """One pass over the layers: the tokens left, how many each mixer shall keep, and what is left behind."""

    def __init__(
        self,
        model: nn.Module,
        tokens: _Tokens,
        sizes: list[int] | None,
        protected: tuple[int, int],
        before: list[LayerState] | None,
    ) -> None:
        self.config = model.config
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        self.tokens, self.sizes, self.protected, self.before = tokens, sizes, protected, before
        self.kept: list[Tensor] = []
        self.states = [LayerState() for _ in model.base_model.layers]

    def mix(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run a mixer; returns its output for the tokens that stay, and which of those that entered these are."""
        before = self.before[mixer.layer_idx] if self.before else LayerState()
        state = self.states[mixer.layer_idx]
        prepare = _before_ssd if hasattr(mixer, "n_groups") else _before_scan
        inputs, gate, state.conv = prepare(mixer, hidden, self.tokens.real, before.conv)

        batch, n = hidden.shape[:2]
        index = torch.arange(n).expand(batch, -1)
        if self.sizes is not None:
            size = self.sizes[len(self.kept)]
            if size < n:
                index = select(_scores(inputs), size, *self.protected)
        self.tokens, inputs, gate = self.tokens.take(index), inputs.take(index), _take(gate, index)
        self.kept.append(self.tokens.places)

        y, state.ssm = _scan(inputs, before.ssm)
        y = y.flatten(2)
        gated_norm = hasattr(mixer, "n_groups") and getattr(mixer, "mamba_rms_norm", True)
        return mixer.out_proj(mixer.norm(y, gate) if gated_norm else y * F.silu(gate)), index

    def attend(self, attention: nn.Module, hidden: Tensor, layer: int) -> Tensor:
        """Run attention over the tokens left and those of earlier calls, each seeing the real ones up to itself."""
        before, state = self.before[layer] if self.before else LayerState(), self.states[layer]
        query, keys, values = (getattr(attention, f"{name}_proj")(hidden) for name in "qkv")
        if hasattr(attention, "linear_q_adapter_list"):  # Zamba2: the shared block's own part in this layer
            place = attention.layer_dic[layer]
            query = query + attention.linear_q_adapter_list[place](hidden)
            keys = keys + attention.linear_k_adapter_list[place](hidden)
            values = values + attention.linear_v_adapter_list[place](hidden)
        keys = keys * getattr(attention, "key_multiplier", 1.0)
        query, keys, values = (
            value.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for value in (query, keys, values)
        )
        if self.rotary is not None:
            cos, sin = self.rotary(hidden, self.tokens.positions)
            query, keys = _rotate(query, cos, sin), _rotate(keys, cos, sin)

        key_places, key_visible = self.tokens.places, self.tokens.real
        if before.keys is not None:
            keys, values = torch.cat([before.keys, keys], dim=2), torch.cat([before.values, values], dim=2)
            key_places = torch.cat([before.key_places, key_places], dim=1)
            key_visible = torch.cat([before.key_visible, key_visible], dim=1)
        state.keys, state.values, state.key_places, state.key_visible = keys, values, key_places, key_visible

        seen = key_visible[:, None, :] & (key_places[:, None, :] <= self.tokens.places[:, :, None])
        shared = attention.num_key_value_groups
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        logits = (query @ keys.transpose(-1, -2) * attention.scaling).masked_fill(~seen[:, None], -torch.inf)
        some = seen.any(-1)[:, None, :, None]  # padding sees nothing, and gets zeros
        weights = torch.softmax(logits.masked_fill(~some, 0.0), dim=-1) * some
        return attention.o_proj((weights @ values).transpose(1, 2).flatten(2))


# --- mixers ahead of their scan --------------------------------------------------------------------------------------


def _convolve(mixer: nn.Module, channels: Tensor, real: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolve (batch, n, channels) over the tokens, on from a window of earlier inputs; returns the next window too."""
    width, n = mixer.conv_kernel_size, channels.shape[1]
    before = channels.new_zeros(channels.shape[0], width, channels.shape[2]) if window is None else window.mT
    padded = torch.cat([before, channels], dim=1)
    taps = mixer.conv1d.weight[:, 0].T
    y = sum(padded[:, 1 + tap : 1 + tap + n] * taps[tap] for tap in range(width))
    if mixer.conv1d.bias is not None:
        y = y + mixer.conv1d.bias
    return mixer.act(y) * real[..., None], padded[:, -width:].mT


def _before_scan(
    mixer: nn.Module, hidden: Tensor, real: Tensor, window: Tensor | None
) -> tuple[_ScanInputs, Tensor, Tensor]:
    """Mamba-1: the scan's inputs, the gate (batch, n, inner channels) and the convolution's window."""
    projected = mixer.in_proj(hidden * real[..., None])
    several = hasattr(mixer, "n_mamba_heads")  # Zamba: several heads; the gate's channels alternate with the others
    channels, gate = projected.unflatten(-1, (-1, 2)).unbind(-1) if several else projected.chunk(2, dim=-1)
    x, window = _convolve(mixer, channels, real, window)

    A, D = -torch.exp(mixer.A_log.float()), mixer.D.float()
    if several:
        x_weight, dt_weight, dt_bias = mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias.float()
    else:
        x_weight, dt_weight, dt_bias = mixer.x_proj.weight[None], mixer.dt_proj.weight[None], mixer.dt_proj.bias.float()
        A, D = A[None], D[None]
    x = x.unflatten(-1, (len(A), -1))
    parameters = torch.einsum("btHp,Hrp->btHr", x, x_weight)
    dt, B, C = parameters.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # FalconMamba, Jamba
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    delta = F.softplus(torch.einsum("btHr,Hpr->btHp", dt, dt_weight) + dt_bias)
    return _ScanInputs(x, delta, B, C, A, D), gate, window


def _before_ssd(mixer: nn.Module, hidden: Tensor, real: Tensor, window: Tensor | None) -> tuple[_ScanInputs, Tensor, Tensor]:
    """Mamba-2: as `_before_scan`."""
    hidden = hidden * real[..., None] * getattr(mixer, "ssm_in_multiplier", 1.0)
    projected = mixer.in_proj(hidden) * getattr(mixer, "mup_vector", 1.0)  # FalconH1
    heads, inner, of_groups = mixer.num_heads, mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    gate, channels, dt = projected.split([inner, inner + 2 * of_groups, heads], dim=-1)
    prompt = window is None
    y, window = _convolve(mixer, channels, real, window)

    x, B, C = y.split([inner, of_groups, of_groups], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (value.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(heads // mixer.n_groups, dim=2) for value in (B, C))
    delta = F.softplus(dt + mixer.dt_bias)
    if prompt or hidden.shape[1] > 1:  # Hugging Face's one-token steps, and mamba-ssm's, know no limits
        delta = delta.clamp(*mixer.time_step_limit)
    delta = delta[..., None].expand_as(x)
    A = -torch.exp(mixer.A_log.float())[:, None, None].expand(-1, x.shape[-1], B.shape[-1])
    return _ScanInputs(x, delta, B, C, A, mixer.D[:, None].expand(-1, x.shape[-1])), gate, window


# --- layers ----------------------------------------------------------------------------------------------------------


def _mamba_layer(walk: _Walk, layer: nn.Module, hidden: Tensor) -> Tensor:
    output, index = walk.mix(layer.mixer, layer.norm(hidden))
    return _take(hidden, index) + output


def _hybrid_layer(walk: _Walk, layer: nn.Module, hidden: Tensor) -> Tensor:
    """Jamba, Bamba and GraniteMoeHybrid: a mixer or attention, then an MLP or experts."""
    scale = getattr(layer, "residual_multiplier", 1.0)
    if getattr(layer, "mamba", None) is not None:
        output, index = walk.mix(layer.mamba, layer.input_layernorm(hidden))
        hidden = _take(hidden, index)
    else:
        output = walk.attend(layer.self_attn, layer.input_layernorm(hidden), layer.self_attn.layer_idx)
    hidden = hidden + output * scale
    if hasattr(layer, "shared_mlp"):
        normed = layer.post_attention_layernorm(hidden)
        return hidden + (layer.block_sparse_moe(normed) + layer.shared_mlp(normed)) * scale
    return hidden + layer.feed_forward(layer.pre_ff_layernorm(hidden))


def _zamba_layer(walk: _Walk, layer: nn.Module, hidden: Tensor) -> Tensor:
    """Zamba and Zamba2: before some mixers, a shared block that reads the embedding again and feeds the mixer alone."""
    if not hasattr(layer, "mamba_decoder"):
        return _zamba_mixer(walk, layer, hidden, hidden)
    block = layer.shared_transf if hasattr(layer, "shared_transf") else layer.shared_transformer
    place = layer.mamba_decoder.layer_idx
    attended = walk.attend(block.self_attn, block.input_layernorm(torch.cat([hidden, walk.tokens.embedding], dim=-1)), place)
    normed = block.pre_ff_layernorm(attended)
    output = block.feed_forward(normed, place) if hasattr(block.feed_forward, "layer_dic") else block.feed_forward(normed)
    return _zamba_mixer(walk, layer.mamba_decoder, hidden, hidden + layer.linear(output))


def _zamba_mixer(walk: _Walk, layer: nn.Module, residual: Tensor, hidden: Tensor) -> Tensor:
    output, index = walk.mix(layer.mamba, layer.input_layernorm(hidden))
    return _take(residual, index) + output


def _falcon_h1_layer(walk: _Walk, layer: nn.Module, hidden: Tensor) -> Tensor:
    """Attention and mixer side by side, both on the tokens that enter; both outputs are for those that stay."""
    normed = layer.input_layernorm(hidden)
    attended = walk.attend(layer.self_attn, normed * layer.attention_in_multiplier, layer.self_attn.layer_idx)
    output, index = walk.mix(layer.mamba, normed)
    both = output * layer.ssm_out_multiplier + _take(attended, index) * layer.attn_out_multiplier
    hidden = _take(hidden, index) + both
    return hidden + layer.feed_forward(layer.pre_ff_layernorm(hidden))


def _nemotron_layer(walk: _Walk, layer: nn.Module, hidden: Tensor) -> Tensor:
    """A mixer, attention, an MLP or experts."""
    normed = layer.norm(hidden)
    if hasattr(layer.mixer, "A_log"):
        output, index = walk.mix(layer.mixer, normed)
        return _take(hidden, index) + output
    if hasattr(layer.mixer, "q_proj"):
        return hidden + walk.attend(layer.mixer, normed, layer.layer_idx)
    return hidden + layer.mixer(normed)


LAYERS: dict[str, Callable[[_Walk, nn.Module, Tensor], Tensor]] = {
    "mamba": _mamba_layer,
    "falcon_mamba": _mamba_layer,
    "mamba2": _mamba_layer,
    "jamba": _hybrid_layer,
    "bamba": _hybrid_layer,
    "granitemoehybrid": _hybrid_layer,
    "zamba": _zamba_layer,
    "zamba2": _zamba_layer,
    "falcon_h1": _falcon_h1_layer,
    "nemotron_h": _nemotron_layer,
}


def n_mixers(model: nn.Module) -> int:
    """How many mixers a model has."""
    return sum(hasattr(module, "A_log") for module in model.modules())


def pruned_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    states: list[LayerState] | None = None,
    *,
    protect_first: int = 0,
    protect_last: int = 1,
    **options: object,
) -> Pass:
    """Run a language model with its tokens pruned as the contract says, or go on after such a pass.

    Parameters
    ----------
    model : nn.Module
        A language model of a class in `LAYERS`, in float32 or float64.
    input_ids : Tensor
        Shape (batch, T).
    attention_mask : Tensor, optional
        Shape (batch, T), 0 at the padding on the left.
    position_ids : Tensor, optional
        Shape (batch, T); without it the tokens are counted from 0, padding included, as the models do.
    states : list of LayerState, optional
        Of an earlier pass, whose tokens these follow. Then nothing is pruned.
    protect_first, protect_last, **options
        Of 1.5: keep, schedule, every, min_tokens. Whatever ``protect_last`` says, the last token stays.
    """
    layer_of, backbone = LAYERS[model.config.model_type], model.base_model
    batch, length = input_ids.shape
    ends = (protect_first, max(protect_last, 1))
    sizes = None
    if states is None:
        sizes = counts(length, n_mixers(model), protect_first=ends[0], protect_last=ends[1], **options)
    start = 1 + max((int(s.key_places.max()) for s in states or [] if s.key_places is not None), default=-1)
    places = torch.arange(start, start + length).expand(batch, -1)
    if position_ids is None:
        position_ids = places
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask

    embedding = backbone.get_input_embeddings()(input_ids) * getattr(backbone, "embedding_multiplier", 1.0)
    tokens = _Tokens(places, position_ids.expand(batch, -1), real.bool(), embedding)
    walk = _Walk(model, tokens, sizes, ends, states)
    hidden = stream = embedding  # of the tokens left; of all
    after = []
    for layer in backbone.layers:
        hidden = layer_of(walk, layer, hidden)
        stream = stream.scatter(1, (walk.tokens.places - start)[..., None].expand_as(hidden), hidden)
        after.append(stream)

    final_norm = next(getattr(backbone, name) for name in ("norm_f", "final_layernorm", "norm") if hasattr(backbone, name))
    final = final_norm(stream)
    logits = model.lm_head(final) * getattr(backbone, "lm_head_multiplier", 1.0)
    logits = logits / getattr(model, "logits_scaling", 1.0)
    hidden_states = [*after, final] if layer_of is _mamba_layer else [embedding, *after[:-1], final]
    return Pass(logits, hidden_states, walk.kept, walk.states)


def reference_generate(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int, **options: object
) -> tuple[Tensor, Tensor]:
    """Generate greedily after a pruned prefill.

    A new token's position is the number of real tokens before it. It attends to the entries that each attention layer
    has of the prompt, padding aside, and to the new tokens before it; mixers go on from their states.

    Parameters
    ----------
    model, input_ids, attention_mask, **options
        As for `pruned_forward`.
    new_tokens : int
        How many.

    Returns
    -------
    written : Tensor
        Shape (batch, new_tokens).
    logits : Tensor
        Shape (batch, new_tokens, vocab): what each of them was chosen by.
    """
    positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    run = pruned_forward(model, input_ids, attention_mask, positions, **options)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    following = real.sum(1, keepdim=True)
    written: list[Tensor] = []
    logits: list[Tensor] = []
    for step in range(new_tokens):
        if step:
            run = pruned_forward(model, written[-1][:, None], None, following + step - 1, run.states)
        logits.append(run.logits[:, -1])
        written.append(logits[-1].argmax(-1))
    return torch.stack(written, dim=1), torch.stack(logits, dim=1)

"""What Dynamo traces in place of functions of transformers, mamba_ssm and causal_conv1d: `torch.ops.simba.*` nodes.

Each has the parameters of the function of its name (`capture` lifts no function that has others), computes what that
computes, and returns NotImplemented for a call that it does not know; `capture` then leaves that call as it is. Nothing of
transformers or mamba_ssm is imported here.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import simba_compile.kernels  # noqa: F401  (registers torch.ops.simba)
from simba_compile.kernels.native.conv import MAX_WIDTH
from simba_compile.kernels.native.scan import MAX_STATES

# --- transformers ------------------------------------------------------------------------------------------------------


def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):  # type: ignore[no-untyped-def]
    """The convolution of a prompt."""
    if activation not in (None, "silu", "swish") or _is_packed(kwargs) or weight.shape[-1] > MAX_WIDTH:
        return NotImplemented
    x = hidden_states.transpose(1, 2)
    return torch.ops.simba.causal_conv1d(x, weight, bias, activation is not None).transpose(1, 2)


def _is_packed(kwargs):  # type: ignore[no-untyped-def]
    """Whether several sequences stand in one row, which a convolution or a scan is to keep apart."""
    return any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))


def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None, **kwargs):  # type: ignore[no-untyped-def]
    """One step of the convolution."""
    if activation not in (None, "silu", "swish") or hidden_states.shape[2] != 1 or _window_does_not_fit(conv_state, weight):
        return NotImplemented
    x = hidden_states.squeeze(2)
    return torch.ops.simba.conv_update(conv_state, x, weight, bias, activation is not None).unsqueeze(2)


def _window_does_not_fit(conv_state, weight):  # type: ignore[no-untyped-def]
    """Whether a cached window is not the convolution's (of a cache that records more, or a short prompt), or is too wide."""
    return conv_state.shape[-1] != weight.shape[-1] or weight.shape[-1] > MAX_WIDTH


def nothing(*args, **kwargs):  # type: ignore[no-untyped-def]
    """A kernel that does a whole mixer: where it gives None, Hugging Face goes on to the convolution and the scan."""
    return None


def mamba_selective_scan(  # type: ignore[no-untyped-def]
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    use_mambapy=False,  # this and the next one: how transformers computes it
    use_associative_scan=False,
    **kwargs,
):
    """The scan of Mamba-1."""
    if _is_packed(kwargs) or A.shape[1] > MAX_STATES:
        return NotImplemented
    x, step, b, c, gate = in_one_type(hidden_states, dt, B, C, z)
    x, step, b, c = x.transpose(1, 2), step.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2)
    gate = None if gate is None else gate.transpose(1, 2)
    y, state = torch.ops.simba.selective_scan(x, step, A, b, c, D, gate, delta_bias, delta_softplus, None)
    y = in_type(y.transpose(1, 2), hidden_states.dtype)
    return (y, state) if return_last_state else y


def mamba_selective_state_update(  # type: ignore[no-untyped-def]
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
):
    """One step of the scan of Mamba-1."""
    if A.shape[1] > MAX_STATES:
        return NotImplemented
    x, step, b, c, gate = in_one_type(hidden_states, dt, B, C, z)
    y = torch.ops.simba.state_update(state, x, step, A, b, c, D, gate, dt_bias, dt_softplus)
    return in_type(y, hidden_states.dtype)


def in_one_type(*values):  # type: ignore[no-untyped-def]
    """What a scan takes for each token, in the widest of their types: under autocast the outputs of norms are wider."""
    kind = functools.reduce(torch.promote_types, [value.dtype for value in values if value is not None])
    return [in_type(value, kind) for value in values]


def in_type(value, kind):  # type: ignore[no-untyped-def]
    """A tensor, or none, in a type; without a node where it has that type."""
    return value if value is None or value.dtype == kind else value.to(kind)


def mamba2_chunk_scan(  # type: ignore[no-untyped-def]
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **kwargs,
):
    """The scan of Mamba-2."""
    if _is_packed(kwargs):
        return NotImplemented
    low, high = dt_limit
    y, state = torch.ops.simba.ssd_scan(hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_states, None)
    return (y, state) if return_final_states else y


def mamba2_selective_state_update(  # type: ignore[no-untyped-def]
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
):
    """One step of the scan of Mamba-2."""
    if _differs_along(A, 1) or _differs_along(A, 2) or _differs_along(dt, 2):  # a head's numbers come repeated
        return NotImplemented
    skip, bias = (None if value is None else value[:, 0] for value in (D, dt_bias))
    y = torch.ops.simba.ssd_state_update(state, hidden_states, dt[:, :, 0], A[:, 0, 0], B, C, skip, bias, dt_softplus)
    return y if z is None else y * F.silu(z)


def _differs_along(value, axis):  # type: ignore[no-untyped-def]
    """Whether a tensor may have other numbers along an axis: not where it is repeated."""
    return value.shape[axis] > 1 and value.stride(axis) != 0


# --- causal_conv1d -----------------------------------------------------------------------------------------------------


def packaged_conv1d_fn(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """``causal_conv1d.causal_conv1d_fn``."""
    if seq_idx is not None or initial_states is not None or return_final_states:
        return NotImplemented
    return causal_conv1d_fn(x, weight, bias, activation)


def packaged_conv1d_update(  # type: ignore[no-untyped-def]
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """``causal_conv1d.causal_conv1d_update``, of one token without an axis for it."""
    if x.dim() != 2 or activation not in (None, "silu", "swish") or _window_does_not_fit(conv_state, weight):
        return NotImplemented
    if cache_seqlens is not None or conv_state_indices is not None:
        return NotImplemented
    return torch.ops.simba.conv_update(conv_state, x, weight, bias, activation is not None)


# --- mamba_ssm ---------------------------------------------------------------------------------------------------------


def selective_scan_fn(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The scan of `Mamba`, where B and C depend on the tokens and are the same for all channels."""
    if A.is_complex() or B.dim() not in (3, 4) or B.dim() != C.dim() or (B.dim() == 4 and B.shape[1] != 1):
        return NotImplemented
    if B.dim() == 4:
        B, C = B.squeeze(1), C.squeeze(1)
    return mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(  # type: ignore[no-untyped-def]
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """All of `Mamba` but its first projection, in one kernel: for us, the operations that it is made of."""
    norms = b_rms_weight, c_rms_weight, dt_rms_weight
    if A.is_complex() or any(value is not None for value in (B, C, B_proj_bias, C_proj_bias, *norms)):
        return NotImplemented
    if A.shape[1] > MAX_STATES or conv1d_weight.shape[-1] > MAX_WIDTH:
        return NotImplemented
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x = torch.ops.simba.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, True)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    step, b, c = F.linear(x, x_proj_weight).split([rank, states, states], dim=-1)
    step = F.linear(step, delta_proj_weight)
    y, _ = torch.ops.simba.selective_scan(x, step, A, b, c, D, z, delta_bias, delta_softplus, None)
    return F.linear(y, out_proj_weight, out_proj_bias)


def selective_state_update(  # type: ignore[no-untyped-def]
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """One step of either scan; that of Mamba-2 has an axis for heads."""
    if state_batch_indices is not None:
        return NotImplemented
    if state.dim() == 3:
        return mamba_selective_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z)
    return mamba2_selective_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z)


def mamba_chunk_scan_combined(  # type: ignore[no-untyped-def]
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """The scan of `Mamba2`, with its gate where no norm follows."""
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        return NotImplemented
    skip = D if D is None or D.dim() == 1 else None
    y, state = mamba2_chunk_scan(x, dt, A, B, C, chunk_size, skip, dt_bias, initial_states, dt_softplus, dt_limit, True)
    if skip is not D:  # a number for each channel
        y = y + x * D
    if z is not None:
        y = y * F.silu(z)
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(  # type: ignore[no-untyped-def]
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """All of `Mamba2` but its first projection, in one kernel: for us, the operations that it is made of."""
    if seq_idx is not None or activation not in (None, "silu", "swish") or conv1d_weight.shape[-1] > MAX_WIDTH:
        return NotImplemented
    heads, size = dt_bias.shape[0], headdim if D.dim() == 1 else D.shape[1]
    inner, width = heads * size, conv1d_weight.shape[0]  # the convolution has x, B and C
    beside = zxbcdt.shape[-1] - inner - width - heads  # of a gated MLP that shares the projections
    mlp, z, xbc, dt = zxbcdt.split([beside, inner, width, heads], dim=-1)
    xbc = torch.ops.simba.causal_conv1d(xbc, conv1d_weight, conv1d_bias, activation is not None)
    x, b, c = xbc.split([inner, (width - inner) // 2, (width - inner) // 2], dim=-1)
    x, z = x.unflatten(-1, (heads, size)), z.unflatten(-1, (heads, size))
    b, c = b.unflatten(-1, (ngroups, -1)), c.unflatten(-1, (ngroups, -1))
    gate = z if rmsnorm_weight is None else None
    y, state = mamba_chunk_scan_combined(
        *(x, dt, A, b, c, chunk_size, D, gate, dt_bias, initial_states),
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z.flatten(-2), rmsnorm_eps, inner // ngroups, norm_before_gate)
    if beside > 0:
        gate, up = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * up, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, state) if return_final_states else y


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):  # type: ignore[no-untyped-def]
    """The norm after the scan of `Mamba2`, by groups of channels, with its gate; in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(wide))
    grouped = y.view(*y.shape[:-1], -1, group_size or y.shape[-1])
    normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normed.view(y.shape).to(x.dtype)
    if bias is not None:
        y = y + bias
    return y * F.silu(z) if z is not None and norm_before_gate else y


def layer_norm_fn(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """The residual add and the norm between layers; in float32 or wider."""
    if x1 is not None or weight1 is not None or rowscale is not None or dropout_p > 0 or return_dropout_mask:
        return NotImplemented
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    if is_rms_norm:
        y = weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(total, (total.shape[-1],), weight.to(wide), None if bias is None else bias.to(wide), eps)
    y = y.to(x.dtype)
    if not prenorm:
        return y
    return y, total.to(residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype)


def rms_norm_fn(x, weight, bias, *args, **kwargs):  # type: ignore[no-untyped-def]
    """`layer_norm_fn` without a mean, and with its arguments but for ``is_rms_norm``."""
    return layer_norm_fn(x, weight, bias, *args, **kwargs, is_rms_norm=True)


SCANS: list[Callable] = [
    *(mamba_selective_scan, mamba2_chunk_scan, selective_scan_fn, mamba_inner_fn),
    *(mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined),
]
OF_A_PROMPT = [causal_conv1d_fn, packaged_conv1d_fn, *SCANS]  # called with a whole prompt, whose length is to be symbolic
OF_A_STEP: list[Callable] = [  # called in every mixer of a decoding step
    *(causal_conv1d_update, mamba_selective_state_update, mamba2_selective_state_update, packaged_conv1d_update),
    selective_state_update,
]

"""The causal convolution, its gradient, one step of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.dtypes import compute_dtype


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_k weight_k x_{t − width + 1 + k} + bias, in the compute type."""
    kind, tokens, width = compute_dtype(x.dtype), x.shape[1], weight.shape[1]
    before = F.pad(x.to(kind), (0, 0, width - 1, 0))
    y = torch.stack([before[:, k : k + tokens] * weight[:, k].to(kind) for k in range(width)]).sum(0)
    return y if bias is None else y + bias.to(kind)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """See `simba_compile.kernels.ops.conv.causal_conv1d`."""
    y = _convolution(x, weight, bias)
    return (F.silu(y) if silu else y).to(x.dtype)


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See `simba_compile.kernels.ops.conv.causal_conv1d_backward`."""
    kind, tokens, width = compute_dtype(x.dtype), x.shape[1], weight.shape[1]
    g = grad.to(kind)
    if silu:
        y = _convolution(x, weight, bias)
        sigmoid = torch.sigmoid(y)
        g = g * (sigmoid + y * sigmoid * (1 - sigmoid))
    before, after = F.pad(x.to(kind), (0, 0, width - 1, 0)), F.pad(g, (0, 0, 0, width - 1))
    dx = torch.zeros_like(g)
    for k in range(width):  # x_t is read with weight k by the output width - 1 - k tokens later
        dx = dx + after[:, width - 1 - k : width - 1 - k + tokens] * weight[:, k].to(kind)
    dweight = torch.stack([(g * before[:, k : k + tokens]).sum((0, 1)) for k in range(width)], 1)
    dbias = x.new_empty(0, dtype=kind) if bias is None else g.sum((0, 1))
    return dx.to(x.dtype), dweight, dbias


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """See `simba_compile.kernels.ops.conv.conv_update`."""
    kind = compute_dtype(x.dtype)
    state.copy_(torch.cat([state[..., 1:], x[..., None].to(state.dtype)], -1))
    y = (state.to(kind) * weight.to(kind)).sum(-1)
    if bias is not None:
        y = y + bias.to(kind)
    return (F.silu(y) if silu else y).to(x.dtype)

"""The RMS norms."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.dtypes import compute_dtype
from simba_compile.kernels.reference.tokens import gather


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `simba_compile.kernels.ops.norm.rms_norm`."""
    kind = compute_dtype(x.dtype)
    u = x.to(kind)
    y = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(kind)).to(x.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.norm.gated_norm`."""
    kind = compute_dtype(x.dtype)
    grouped = (x.to(kind) * F.silu(gate.to(kind))).unflatten(-1, (groups, -1))
    y = (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    return (y if weight is None else y * weight.to(kind)).to(dtype or x.dtype)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `simba_compile.kernels.ops.norm.add_norm`."""
    total = (residual if index is None else gather(residual, index)) + x
    return total, rms_norm(total.to(x.dtype), weight, eps)

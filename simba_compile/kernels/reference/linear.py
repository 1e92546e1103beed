"""Linear layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_compile.kernels.reference.tokens import gather


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """See `simba_compile.kernels.ops.linear.linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    if add is None:
        return F.linear(x, weight, bias).contiguous()
    add = add if index is None else gather(add, index)
    product = torch.addmm(add.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]), weight.t()).view(add.shape)
    return product if bias is None else product + bias

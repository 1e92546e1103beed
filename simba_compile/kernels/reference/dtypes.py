"""What is computed in: float32 or wider."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that a kernel computes in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32

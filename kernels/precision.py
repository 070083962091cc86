"""Precision of float32 products, following PyTorch's settings for its own ops."""

from __future__ import annotations

import torch


def tf32_settings() -> tuple[str, str]:
    """Allowed precisions of PyTorch's convolutions and matrix products: "tf32", "ieee" or "none" (same as "ieee").

    PyTorch has old and new settings. The new ones reflect both; reading the old ones may raise.
    """
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of products: TF32 for float32 if PyTorch's convolutions may use it."""
    return "tf32" if dtype == torch.float32 and tf32_settings()[0] == "tf32" else "ieee"

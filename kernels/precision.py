"""How float32 operands are multiplied: what PyTorch's settings allow stock's own ops."""

from __future__ import annotations

import torch


def tf32_settings() -> tuple[str, str]:
    """What stock's convolutions and matrix products may use for float32: "tf32", "ieee" or "none" (ieee, too).

    PyTorch has an old and a new spelling of these settings; the new one tells both, asked for the old one it may raise.
    """
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def dot_precision(dtype: torch.dtype, linear: bool = False) -> str:
    """How float32 operands are multiplied: in TF32 where stock's convolutions (linear layers) may use it."""
    return "tf32" if dtype == torch.float32 and tf32_settings()[linear] == "tf32" else "ieee"

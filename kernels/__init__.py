"""Triton kernels for maps in channels-last memory, each beside a plain-PyTorch reference that states its meaning."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from .choice import current_mode


def enabled(device: torch.device) -> bool:
    """Whether the engine gives work on a device to this package.

    On a CUDA GPU with Triton, unless GIGAMORPH_KERNELS or `choice.override` says "stock"; elsewhere only where they
    say "triton" (Triton's interpreter: slow, for tests).
    """
    mode = current_mode()
    return (mode == "triton" or (device.type == "cuda" and mode != "stock")) and find_spec("triton") is not None

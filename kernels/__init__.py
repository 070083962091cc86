"""Triton kernels for maps in channels-last memory, each beside a plain-PyTorch reference that states its meaning."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from importlib.util import find_spec

import torch

from .choice import current_mode


def enabled(device: torch.device) -> bool:
    """Whether the engine gives work on a device to this package.

    On a CUDA GPU with Triton and the C compiler that it needs, unless GIGAMORPH_KERNELS or `choice.override` says
    "stock"; elsewhere only where they say "triton" (Triton's interpreter: slow, for tests).
    """
    mode = current_mode()
    if mode == "triton":
        return find_spec("triton") is not None
    return device.type == "cuda" and mode != "stock" and missing() is None


@functools.cache
def missing() -> str | None:
    """What Triton lacks on this machine to compile kernels; None if nothing. Warned of once."""
    if find_spec("triton") is None:
        lacks = "triton is not installed; pip install triton"
    elif not any(map(shutil.which, (os.environ.get("CC") or "", "clang", "gcc"))):
        lacks = "Triton needs a C compiler and finds none; install gcc, or name one in the environment variable CC"
    else:
        return None
    logging.getLogger("gigamorph").warning("PyTorch's own ops run on the GPU in place of kernels: %s", lacks)
    return lacks

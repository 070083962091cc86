"""Triton kernels for maps in channels-last memory."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from importlib.util import find_spec

import torch

from .choice import current_mode


def enabled(device: torch.device) -> bool:
    """Whether the engine uses this package's kernels on a device.

    It does on a CUDA GPU with Triton and a C compiler, unless GIGAMORPH_KERNELS or `choice.override` is "stock". On
    other devices it does only if one of them is "triton" (Triton's interpreter: slow, for tests).
    """
    mode = current_mode()
    if mode == "triton":
        return find_spec("triton") is not None
    return device.type == "cuda" and mode != "stock" and missing() is None


@functools.cache
def missing() -> str | None:
    """The reason why Triton cannot compile kernels on this machine; None if it can. It warns once."""
    if find_spec("triton") is None:
        reason = "triton is not installed; pip install triton"
    elif not any(map(shutil.which, (os.environ.get("CC") or "", "clang", "gcc"))):
        reason = "Triton needs a C compiler and found none; install gcc, or set the environment variable CC"
    else:
        return None
    logging.getLogger("gigamorph").warning("the GPU runs PyTorch's own ops instead of kernels: %s", reason)
    return reason

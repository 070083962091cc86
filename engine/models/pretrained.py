"""timm's pretrained weights by network name, and the normalisation of the images that they were trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError, GigamorphError
from .compat import make_torchvision_importable
from .spec import Spec
from .weights import first_line

TIMM = "timm:"


def pretrained_state(name: str) -> dict[str, Tensor]:
    """Return the pretrained weights of ``timm:NAME``, for three channels and their original classes.

    Raises:
        DataError: they cannot be downloaded. GigamorphError: timm is not installed.
    """
    timm, spec = import_timm(name), Spec.parse(name)
    if ":" in spec.name:
        raise GigamorphError(f"{name}: is not a timm network, whose names have no colon; use a file or folder")
    try:
        return dict(timm.create_model(spec.name, pretrained=True).state_dict())
    except Exception as error:  # of the network, the hub and its cache
        raise DataError(
            f"{name}: timm cannot provide its pretrained weights ({first_line(error)}); without internet access, "
            "download the file elsewhere and pass it to --init or gigamorph import"
        ) from error


def pretrained_scale(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of the images that ``timm:NAME`` was trained on.

    Raises:
        GigamorphError: timm is not installed, or has no such network.
    """
    timm, spec = import_timm(name), Spec.parse(name)
    try:
        found = timm.models.get_pretrained_cfg(spec.name)
        if found is None:
            raise ValueError("it has no pretrained weights of this name")
        return list(found.mean), list(found.std)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise GigamorphError(f"{name}: timm has no pretrained weights for it: {first_line(error)}") from error


def import_timm(name: str) -> Any:
    """Import timm for a network; `name` names it in the message.

    Raises:
        GigamorphError: timm cannot be imported.
    """
    make_torchvision_importable()
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        raise GigamorphError(
            f"{name} needs timm, which cannot be imported ({first_line(error)}); pip install timm, with the "
            "torchvision build that matches torch"
        ) from error
    return timm

"""Weights that timm fetches by the name of a network, and the scale of the images that they were made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError, GigamorphError
from .compat import make_torchvision_importable
from .spec import Spec
from .weights import first_line

TIMM = "timm:"


def pretrained_state(name: str) -> dict[str, Tensor]:
    """The pretrained weights of ``timm:NAME``, for three channels and the classes that they were trained on.

    Raises:
        DataError: they cannot be had. GigamorphError: timm is not there.
    """
    timm, spec = _timm(name), Spec.parse(name)
    if ":" in spec.name:
        raise GigamorphError(f"{name}: is not a network of timm's, whose names have no colon; name a file or folder")
    try:
        return dict(timm.create_model(spec.name, pretrained=True).state_dict())
    except Exception as error:  # of the network, the hub and its cache
        raise DataError(
            f"{name}: timm cannot give its pretrained weights ({first_line(error)}); without a network fetch the file "
            "yourself and give it to --init or gigamorph import"
        ) from error


def pretrained_scale(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel for which ``timm:NAME`` was trained.

    Raises:
        GigamorphError: timm is not there, or has no such network.
    """
    timm, spec = _timm(name), Spec.parse(name)
    try:
        found = timm.models.get_pretrained_cfg(spec.name)
        if found is None:
            raise ValueError("it has no pretrained weights of this name")
        return list(found.mean), list(found.std)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise GigamorphError(f"{name}: timm has no pretrained weights of it: {first_line(error)}") from error


def _timm(name: str) -> Any:
    make_torchvision_importable()
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        raise GigamorphError(f"{name} needs timm, which cannot be imported ({first_line(error)})") from error
    return timm

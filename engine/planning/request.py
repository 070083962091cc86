"""What a step has to keep to."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..tiling.memory import available_bytes
from . import constants


@dataclass(frozen=True)
class Request:
    """What a step has to keep to.

    Attributes:
        budget: bytes; None for what is free.
        available: bytes that are free, of which a share is taken; None asks the device.
        tile: (height, width) of a tile of the image; None for the preferred one if it fits, else the largest that does.
        training: whether there is a backward.
        halos: where the halos may be kept between the passes: "device", "host", "disk" or "auto".
        image_grad: whether the image wants a gradient.
        count_tile: count a given tile's own bytes too; without that, time is saved where only the schedule matters.
        fallback: what happens to ops that cannot be computed by tiles, see `sort`.
    """

    budget: int | None
    tile: tuple[int, int] | None
    training: bool
    halos: str = "auto"
    image_grad: bool = False
    count_tile: bool = True
    fallback: str | None = None
    available: int | None = None

    def limit(self, device: torch.device) -> int:
        """Bytes that the step may take."""
        if self.budget is not None:
            return self.budget
        return int(constants.FREE_SHARE * (available_bytes(device) if self.available is None else self.available))

    def room(self, device: torch.device) -> int | None:
        """Bytes that graphs of tiles may fill: the budget, or without one what is free on a GPU that nothing shares.

        Of the CPU's memory, which others use too, that is a part; processes that train together share it. Not where a
        tile is given: on a GPU small tiles are faster replayed than retained, and elsewhere it asks for little memory.
        """
        if self.budget is not None or self.tile is not None:
            return self.budget
        if device.type != "cpu":
            return self.limit(device)
        return int(constants.FREE_ROOM_SHARE * self.limit(device)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def halo_places(self, device: torch.device) -> list[str]:
        """Where the halos may be kept, the fastest first."""
        if self.halos != "auto":
            return [self.halos]
        return ["device", "disk"] if device.type == "cpu" else ["device", "host", "disk"]

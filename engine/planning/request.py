"""The constraints of a step: memory budget, tile, halo storage."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..tiling.memory import available_bytes
from . import constants


@dataclass(frozen=True)
class Request:
    """The constraints of a step.

    Attributes:
        budget: the budget in bytes; None for a share of the free memory.
        tile: (height, width) of a tile of the image; None for the preferred size if it fits, else the largest that
            fits.
        training: whether there is a backward.
        halos: storage of the halos between the passes: "device", "host", "disk" or "auto".
        image_grad: whether the image requires a gradient.
        count_tile: whether to count the bytes of a given tile, which takes time; the schedule does not need them.
        fallback: the treatment of ops that cannot be tiled, see `sort`.
        available: free bytes, of which a share is used; None queries the device.
        in_memory: whether the image is a tensor on the device, so that it may be computed as a whole.
        stock: the peak of the same step in stock PyTorch, if it limits the retained graphs of tiles.
    """

    budget: int | None
    tile: tuple[int, int] | None
    training: bool
    halos: str = "auto"
    image_grad: bool = False
    count_tile: bool = True
    fallback: str | None = None
    available: int | None = None
    in_memory: bool = True
    stock: int | None = None

    def limit(self, device: torch.device) -> int:
        """Bytes that the step may use."""
        if self.budget is not None:
            return self.budget
        return int(constants.FREE_SHARE * (available_bytes(device) if self.available is None else self.available))

    def room(self, device: torch.device) -> int | None:
        """The peak up to which graphs of tiles may be retained: the budget, or without one the limit on a GPU.

        On the CPU it is the peak of stock PyTorch's step, and at most a part of the limit, because other processes
        share the memory; processes that train together divide it. It is None if only a tile is given: on a GPU small
        tiles are replayed faster than retained, and on the CPU a given tile signals a low memory use.
        """
        if self.budget is not None or self.tile is not None:
            return self.budget
        if device.type != "cpu":
            return self.limit(device)
        room = int(constants.FREE_ROOM_SHARE * self.limit(device)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return room if self.stock is None else min(room, self.stock)

    def halo_places(self, device: torch.device) -> list[str]:
        """The storage options of the halos, the fastest first."""
        if self.halos != "auto":
            return [self.halos]
        return ["device", "disk"] if device.type == "cpu" else ["device", "host", "disk"]

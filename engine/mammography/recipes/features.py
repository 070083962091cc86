"""Features of a frozen network, computed once and cached on disk.

A feature's key is a hash of everything that it depends on: the network's weights and layers, the settings that turn a
file into the network's input, and the bytes of the image's file. Cache files are written atomically. So an interrupted
run continues with the missing images, and features of other weights are never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...accelerate import accelerate
from ...datasets.dataset import ImageDataset
from ...datasets.tables import Record
from ...errors import DataError, GigamorphError
from ...files import write_atomically
from ...images.pixels import PixelSource
from ...models.weights import sha256
from ...morph.running import eval_mode
from ...train.progress import Meter
from ...train.run import Run
from .sized import Size, read_sized

Array = np.ndarray[Any, Any]


class _LayerReached(Exception):
    """Raised at the layer, because the computation after it is not needed."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _StopHook:
    """A forward hook that ends the forward while it is on."""

    on = False

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.on:
            raise _LayerReached(output)


class UpTo(nn.Module):
    """A network up to the output of one of its modules.

    Args:
        network: any network.
        layer: the module's name, as in ``named_modules``; "" for the whole network.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        known = [name for name, _ in network.named_modules()]
        if layer not in known:
            names = ", ".join(name for name in known if name and "." not in name)
            raise GigamorphError(f"unknown layer {layer!r}; the network's modules are {names}")
        self.network, self.layer, self._stop = network, layer, _StopHook()
        if layer:
            # Once, not in each forward: TorchDynamo cannot record the creation of a handle.
            network.get_submodule(layer).register_forward_hook(self._stop)

    def forward(self, x: Tensor) -> Any:
        if not self.layer:
            return self.network(x)

        self._stop.on = True
        try:
            self.network(x)
        except _LayerReached as stopped:
            return stopped.output
        finally:
            self._stop.on = False
        raise GigamorphError(f"layer {self.layer!r} is not used by the network's forward; choose another")


def shape_of_maps(network: nn.Module, channels: int, side: int = 64) -> torch.Size:
    """Return the shape (1, C, h, w) of the maps that a network outputs for a square image.

    Raises:
        GigamorphError: it outputs something else.
    """
    with eval_mode(network), torch.no_grad():
        found = network(torch.zeros(1, channels, side, side))
    if not isinstance(found, Tensor) or found.ndim != 4:
        raise GigamorphError("the backbone's features must be maps (N, C, h, w); choose another layer")
    return found.shape


def fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's layers and of all bits of its parameters and buffers."""
    found = hashlib.sha256(repr(network).encode())
    for name, value in network.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def image_digest(path: Path) -> str:
    """Return a hash of an image's file, or of all files if the image is a folder (zarr)."""
    try:
        if not path.is_dir():
            return sha256(path)
        found = hashlib.sha256()
        for part in sorted(p for p in path.rglob("*") if p.is_file()):
            found.update(f"{part.relative_to(path).as_posix()} ".encode() + bytes.fromhex(sha256(part)))
        return found.hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def record_digest(record: Record) -> str:
    """Return a hash of an image's file, with the table's entries on how to read it."""
    entries = record.frame, record.white, record.chest_wall, record.laterality
    return " ".join([image_digest(record.path), *map(str, entries)])


class Features(Sequence[Array]):
    """Features of images in order, each read from its file on access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Features(self._paths[index])
        return np.load(self._paths[index], allow_pickle=False)

    def take(self, indices: Sequence[int]) -> Features:
        """Return the features of some images."""
        return Features([self._paths[index] for index in indices])


@torch.no_grad()
def frozen_features(
    network: nn.Module,
    images: ImageDataset,
    folder: str | Path,
    *,
    size: Size | None = None,
    batch_size: int = 16,
    run: Run | None = None,
    stage: str = "features",
) -> Features:
    """Return the network's output for every image, from ``folder`` or computed and stored there.

    Args:
        network: used in evaluation mode; outputs one tensor per image, a map (C, h, w) or a vector (C,).
        images: their preprocessing is part of the key; they are not augmented.
        size: how images are resized. Native images are computed one at a time, read region by region; others in
            batches.
        run: device, memory budget of a forward, and report of progress.

    Raises:
        DataError: an image cannot be read. Features computed before it are stored.
        GigamorphError: features are not finite, or files cannot be written.
    """
    size, folder, run = size or Size(), Path(folder), run or Run(Path(folder))
    key = hashlib.sha256((fingerprint(network) + json.dumps(_settings(images, size), sort_keys=True)).encode())
    paths = []
    for record in images.records:
        own = key.copy()
        own.update(record_digest(record).encode())
        name = own.hexdigest()
        paths.append(folder / name[:2] / f"{name}.npy")
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    meter = Meter(run.report)
    meter.start(stage, len(paths), done=len(paths) - len(missing))
    with eval_mode(network):
        net = accelerate(network.to(run.device), run.memory_budget, fallback="untiled")
        net.on_tile = meter.on_tile
        per_batch = 1 if size.native else batch_size
        for first in range(0, len(missing), per_batch):
            batch = missing[first : first + per_batch]
            sources: list[PixelSource] = [images[index]["image"] for index in batch]
            for source in sources:
                meter.image(source.shape[1] * source.shape[2])
            x = sources if size.native else torch.stack([read_sized(s, size) for s in sources]).to(run.device)
            for index, feature in zip(batch, net(x), strict=True):
                _store(paths[index], feature, sources[batch.index(index)].name)
                meter.image_done()
    return Features(paths)


def _store(path: Path, feature: Tensor, name: str) -> None:
    values = feature.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise GigamorphError(f"{name}: the network's features are not finite; check its weights and the image")
    write_atomically(path, lambda temporary: np.save(temporary, values, allow_pickle=False), "features")


def _settings(images: ImageDataset, size: Size) -> Mapping[str, Any]:
    """Return the settings that turn a file into the network's input."""
    normalize = None if images.normalize is None else images.normalize.to_dict()
    own = {name: getattr(images, name) for name in ("voi", "flip", "channels", "downsample", "for_processing")}
    return {"resize": size.resize, "crop": size.crop, "normalize": normalize, **own}

"""Census of networks for volumes that others wrote: two steps by tiles against stock PyTorch in float64.

    python benchmarks/volumes.py --json benchmarks/results/volumes.json

Networks that the file has already are not checked again.
Each network is checked in both modes of its norms by `accelerate(..., verify=True)`: outputs, all gradients and buffers
at two small sizes, with two volumes in the batch and dropout off. The printed table is that of docs/volumes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  (torchvision beside a CPU build of PyTorch)
from monai.networks import nets  # noqa: E402
from torchvision.models import video  # noqa: E402

from gigamorph import GigamorphError, accelerate  # noqa: E402
from gigamorph.engine.bench.machine import provenance  # noqa: E402

Made = tuple[Callable[[], nn.Module], tuple[int, int]]  # network, (channels, depth)
_DOWN, _UP = [1, (1, 2, 2), 2], [(1, 2, 2), 2]  # strides and kernels of a U-Net
NETWORKS: dict[str, Made] = {
    "torchvision r3d_18": (lambda: video.r3d_18(num_classes=2), (3, 8)),
    "torchvision mc3_18": (lambda: video.mc3_18(num_classes=2), (3, 8)),
    "torchvision r2plus1d_18": (lambda: video.r2plus1d_18(num_classes=2), (3, 8)),
    "torchvision swin3d_t": (lambda: video.swin3d_t(num_classes=2), (3, 8)),
    "MONAI ResNet-10": (lambda: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=2), (1, 16)),
    "MONAI DenseNet-121": (lambda: nets.DenseNet121(3, 1, 2), (1, 32)),
    "MONAI SE-ResNet-50": (lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2), (1, 32)),
    "MONAI SegResNet": (lambda: nets.SegResNet(3, 8, 1, 2), (1, 16)),
    "MONAI DynUNet": (lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], _DOWN, _UP, filters=[8, 16, 24]), (1, 8)),
    "MONAI BasicUNet": (lambda: nets.BasicUNet(3, 1, 2, (8, 8, 16, 16, 32, 8)), (1, 16)),
    "MONAI UNet": (lambda: nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), (1, 8)),
    "MONAI AttentionUnet": (lambda: nets.AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)), (1, 8)),
    "MONAI VNet": (lambda: nets.VNet(3, 1, 2, dropout_prob_down=None), (1, 16)),
    "MONAI HighResNet": (lambda: nets.HighResNet(3, 1, 2), (1, 6)),
    "MONAI SwinUNETR": (lambda: nets.SwinUNETR(1, 2, feature_size=12, spatial_dims=3), (1, 32)),
    "torchvision s3d": (lambda: video.s3d(num_classes=2, dropout=0.0), (3, 16)),
}


def judged(name: str, training: bool) -> str:
    """Return "exact", or why it is refused or wrong."""
    make, (channels, depth) = NETWORKS[name]
    torch.manual_seed(0)
    network = make().train(training)
    try:
        side = 224 if name.endswith("s3d") else 128  # its last pooling needs 7 x 7 positions
        accelerate(network, tile=32, verify=True)(torch.rand(1, channels, depth, side, side))
    except GigamorphError as error:
        return str(error)
    return "exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    print("| network | frozen norms | norms in training mode |\n|---|---|---|")
    rows = json.loads(path.read_text())["networks"] if path is not None and path.exists() else {}
    for name in NETWORKS:
        rows[name] = rows.get(name) or {"frozen": judged(name, False), "training": judged(name, True)}
        print("| " + " | ".join((name, *(found.partition(";")[0] for found in rows[name].values()))) + " |", flush=True)
        if path is not None:
            path.write_text(json.dumps({"provenance": provenance(), "networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

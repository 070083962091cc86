"""A slide in a tiled TIFF: a segmentation network trains on it and writes its map, and nothing is ever whole."""

from pathlib import Path

import click
import numpy as np
import tifffile
import torch
from torch import nn

from gigamorph import accelerate, dense_loss, open_pixels, write_map


def make_slide(folder: Path, height: int, width: int) -> tuple[Path, Path]:
    """A slide of blue discs on pink, and a mask of the discs."""
    rows, columns = np.ogrid[:height, :width]
    disc = (rows % 200 - 100) ** 2 + (columns % 200 - 100) ** 2 < 50**2
    image = np.where(disc[..., None], [90, 60, 160], [230, 160, 200]).astype(np.uint8)
    tifffile.imwrite(folder / "slide.tif", image, tile=(256, 256), photometric="rgb")
    np.save(folder / "mask.npy", disc[None, None].astype(np.float32))
    return folder / "slide.tif", folder / "mask.npy"


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path, height: int = 900, width: int = 700, steps: int = 8) -> list[float]:
    folder.mkdir(parents=True, exist_ok=True)
    slide, mask = make_slide(folder, height, width)
    image = open_pixels(slide, channels=3)
    truth = np.load(mask, mmap_mode="r")  # read by region, as the slide is
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    net = accelerate(network, memory_budget="64MiB", tile=256)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = dense_loss(net, [image], truth, nn.functional.binary_cross_entropy_with_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses)} of {steps}: loss {loss.item():.4f}")
    write_map(net, [image], str(folder / "logits.npy"))
    print(f"the map of logits: {folder / 'logits.npy'}")
    return losses


if __name__ == "__main__":
    main()

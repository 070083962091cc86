"""A training loop in plain PyTorch: the network is accelerated, everything else is unchanged."""

import csv
from pathlib import Path

import click
import torch
from torch.nn.functional import cross_entropy

from gigamorph import Normalize, accelerate, create_model, open_pixels
from gigamorph.engine.mammography.phantom import write_phantoms


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path, epochs: int = 2) -> list[float]:
    table = write_phantoms(folder, patients=4, height=256, width=192, seed=1)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A file is opened here and read tile by tile, in the forward and in the backward.
    grey = Normalize(mean=(0.3,), std=(0.1,))
    images = [open_pixels(table.parent / row["image_path"], normalize=grey) for row in rows]
    labels = torch.tensor([int(row["label"]) for row in rows])

    torch.manual_seed(0)
    net = accelerate(create_model("lesionnet"), memory_budget="64MiB")
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for epoch in range(epochs):
        for image, label in zip(images, labels, strict=True):
            loss = cross_entropy(net(image), label[None])  # equal to that of the whole image, with all gradients
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses[-len(images) :]) / len(images):.4f}")
    torch.save(net.state_dict(), folder / "weights.pt")  # the keys of the network itself
    print(f"weights: {folder / 'weights.pt'}")
    return losses


if __name__ == "__main__":
    main()

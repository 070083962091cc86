"""The same training with Lightning: an accelerated network is an ordinary module."""

import csv
from pathlib import Path

import click
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gigamorph import Normalize, accelerate, create_model, open_pixels
from gigamorph.engine.mammography.phantom import write_phantoms
from gigamorph.engine.models.compat import make_torchvision_importable

make_torchvision_importable()  # only where torchvision was built for another torch

import lightning.pytorch as pl  # noqa: E402


class Mammograms(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = accelerate(create_model("lesionnet"), memory_budget="64MiB")
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels.to(self.device))
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # pixels go to the device tile by tile

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def collate(items):
    images, labels = zip(*items, strict=True)
    return list(images), torch.tensor(labels)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> list[float]:
    table = write_phantoms(folder, patients=4, height=256, width=192, seed=1)
    grey = Normalize(mean=(0.3,), std=(0.1,))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    items = [(open_pixels(table.parent / row["image_path"], normalize=grey), int(row["label"])) for row in rows]
    torch.manual_seed(0)
    module = Mammograms()
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", devices=1, logger=False, default_root_dir=folder)
    trainer.fit(module, DataLoader(items, batch_size=2, collate_fn=collate))
    first, last = (sum(part) / 4 for part in (module.losses[:4], module.losses[-4:]))
    print(f"loss of the first epoch {first:.4f}, of the last {last:.4f}")
    return module.losses


if __name__ == "__main__":
    main()

"""What happens around the steps: positions and checkpoints, Ctrl-C, the log of the epochs."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..models.compat import make_torchvision_importable
from ..parallel.process_group import ProcessGroup
from ..tiling.memory import peak_bytes, reset_peak
from .curves import write_log
from .module import Classifier
from .progress import Meter

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback, Checkpoint  # noqa: E402


class InterruptedTraining(Exception):
    """Training stopped at Ctrl-C, after the checkpoint was written."""


class EpochLog(Callback):
    """One row per epoch: losses, AUC, rate, seconds, throughput and peak memory; drives the progress report too."""

    def __init__(self, folder: Path, meter: Meter, group: ProcessGroup) -> None:
        self.rows: list[dict[str, float]] = []
        self._folder, self._meter, self._group = folder, meter, group
        self._clock, self._pixels = time.monotonic(), 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock, self._pixels = time.monotonic(), 0
        reset_peak(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or self._pixels == 0:
            epochs, images = trainer.max_epochs or 1, len(trainer.train_dataloader.dataset)  # pyright: ignore
            done = self._group.done(batch_idx, images)
            self._meter.start("train", images, trainer.current_epoch, epochs, done)
        self._pixels += sum(i["image"].shape[-2] * i["image"].shape[-1] for i in batch)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.image_done()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images = len(trainer.val_dataloaders.dataset)  # pyright: ignore[reportOptionalMemberAccess]
        self._meter.start("validate", images, trainer.current_epoch, trainer.max_epochs or 1)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.image_done()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        seconds = time.monotonic() - self._clock
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        optimizer = trainer.optimizers[0]
        pixels = self._group.all(self._pixels)[:: self._group.size // self._group.at_once]
        row = {
            "epoch": trainer.current_epoch + 1,
            "train_loss": float(np.mean(self._group.in_order(pl_module.training_losses))),
            **metrics,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "megapixels_per_second": round(sum(pixels) / 1e6 / max(seconds, 1e-9), 3),
            "peak_bytes": max(self._group.all(peak_bytes(pl_module.device))),
        }
        self.rows.append(row)
        pl_module.training_losses.clear()
        if self._group.leads:
            write_log(self._folder, self.rows)
        shown = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"loss {row['train_loss']:.4f}"]
        for name, label in (("val_loss", "val loss"), ("val_auc_image", "val AUC")):
            if name in metrics:
                shown.append(f"{label} {metrics[name]:.4f}")
        self._meter.note("  ".join(shown))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows[:] = state_dict["rows"]


class Checkpoints(Checkpoint):
    """``last.ckpt`` after each epoch and at Ctrl-C, ``best.ckpt`` whenever the validation score is the best so far.

    The first Ctrl-C lets the image under way (or the validation, which Lightning cannot take up again in its midst)
    finish, writes ``last.ckpt`` and raises `InterruptedTraining`; a second one interrupts at once and leaves the
    former ``last.ckpt``. Lightning's own `ModelCheckpoint` writes its last checkpoint only when it also writes a best
    one, and knows no place inside an epoch. All processes of a group stop at the same place, at a Ctrl-C to any of
    them.
    """

    def __init__(self, folder: Path, group: ProcessGroup) -> None:
        self._folder, self._group = folder, group
        self._best: list[float] | None = None
        self._asked = False
        self._stopped = False
        self._former: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self.restore_handler()

    def restore_handler(self) -> None:
        """Give Ctrl-C back to whom it belonged; Lightning leaves it ignored after an interruption."""
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if any(self._group.all(self._asked)):
            self._save(trainer, "last.ckpt")
            raise InterruptedTraining

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self._folder / name)
        self._group.wait()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        done = self._group.done(batch_idx + 1, len(trainer.train_dataloader.dataset))  # pyright: ignore
        pl_module.position = (trainer.current_epoch, done)
        # After the last image the epoch still lacks its validation: stopping there would skip it on resuming.
        if batch_idx + 1 < trainer.num_training_batches:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.position = (trainer.current_epoch + 1, 0)
        found = trainer.callback_metrics
        # Without validation images the latest state is the best known. Few images make many equal scores: the loss
        # decides between them.
        value = [float(found["val_score"]), -float(found["val_loss"])] if "val_score" in found else None
        better = value is None or self._best is None or value > self._best
        if better:
            self._best = value
        self._stopped = trainer.should_stop
        self._save(trainer, "last.ckpt")
        if better:
            self._save(trainer, "best.ckpt")
        if any(self._group.all(self._asked)):
            raise InterruptedTraining

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

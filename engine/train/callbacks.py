"""What happens around the steps: positions and checkpoints, Ctrl-C, the log of the epochs."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..memory import peak_bytes, reset_peak
from ..models.compat import make_torchvision_importable
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

    def __init__(self, folder: Path, meter: Meter) -> None:
        self.rows: list[dict[str, float]] = []
        self._folder, self._meter = folder, meter
        self._clock, self._pixels = time.monotonic(), 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock, self._pixels = time.monotonic(), 0
        reset_peak(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or self._pixels == 0:
            epochs = trainer.max_epochs or 1
            self._meter.start("train", int(trainer.num_training_batches), trainer.current_epoch, epochs, done=batch_idx)
        self._pixels += sum(i["image"].shape[-2] * i["image"].shape[-1] for i in batch)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.image_done()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images = sum(int(n) for n in trainer.num_val_batches)
        self._meter.start("validate", images, trainer.current_epoch, trainer.max_epochs or 1)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.image_done()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        seconds = time.monotonic() - self._clock
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        optimizer = trainer.optimizers[0]
        row = {
            "epoch": trainer.current_epoch + 1,
            "train_loss": float(np.mean(pl_module.training_losses)),
            **metrics,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "megapixels_per_second": round(self._pixels / 1e6 / max(seconds, 1e-9), 3),
            "peak_bytes": peak_bytes(pl_module.device),
        }
        self.rows.append(row)
        pl_module.training_losses.clear()
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
    one, and knows no place inside an epoch.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        if self._asked:
            trainer.save_checkpoint(self._folder / "last.ckpt")
            raise InterruptedTraining

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.position = (trainer.current_epoch, batch_idx + 1)
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
        trainer.save_checkpoint(self._folder / "last.ckpt")
        if better:
            trainer.save_checkpoint(self._folder / "best.ckpt")
        if self._asked:
            raise InterruptedTraining

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

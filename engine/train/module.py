"""A stage of a task as a Lightning module: batches, loss, optimizer and learning rate."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..models.compat import make_torchvision_importable
from .optimizers import factor_of, make_optimizer
from .run import Run, seed_of
from .stages import Stage, train_mode
from .state import State
from .statistics import Average, RunningStatistics
from .task import Task

make_torchvision_importable()

import lightning.pytorch as pl  # noqa: E402

log = logging.getLogger("gigamorph")


class Batches:
    """This process's batches of a task's epochs: an iterable that draws a new order in each epoch.

    The order depends only on the seed and the epoch, and batches that were done before an interruption are omitted, so
    a resumed run sees the same batches as an uninterrupted one. The rest is distributed to the processes of the group.

    Raises:
        GigamorphError: if there are no examples.
    """

    def __init__(self, task: Task, stage: Stage, state: State, seed: int) -> None:
        self._task, self._stage, self._state, self._seed = task, stage, state, seed
        self.total = -(-len(self._examples()) // stage.batch_size)
        """Batches of an epoch, for all processes."""

    def _examples(self) -> Sequence[Any]:
        examples = self._task.examples(self._state.epoch)
        if not len(examples):
            raise GigamorphError(
                f"stage '{self._stage.name}': there are no training examples in epoch {self._state.epoch + 1}"
            )
        return examples

    def __len__(self) -> int:
        return -(-self.total // self._task.group.at_once)

    def __iter__(self) -> Iterator[list[Any]]:
        examples, state, size = self._examples(), self._state, self._stage.batch_size
        order = self._task.order(len(examples), np.random.default_rng([self._seed, state.epoch])).tolist()
        batches = range(state.batch, self.total)
        done = min(state.batch * size, len(order))
        self._task.meter.start(self._stage.name, len(order), state.within, self._stage.epochs, done, training=True)
        own = iter(self._task.group.share(batches))

        def next_batch() -> list[Any] | None:
            """The next batch, which the task can prefetch while it computes the current one."""
            number = next(own, None)
            if number is None:
                return None
            batch = [examples[i] for i in order[number * size : (number + 1) * size]]
            self._task.ahead(batch)
            return batch

        coming = next_batch()
        while (batch := coming) is not None:
            coming = next_batch()
            yield batch


def seed_of_batch(seed: int, epoch: int, number: int, stage: Stage) -> int:
    """The seed of a batch: from the run's seed, the epoch, the optimizer step and the index in the step."""
    return seed_of(seed, epoch, *divmod(number, stage.accumulate))


class StageModule(pl.LightningModule):
    """One stage of a task, after `freeze`.

    Random numbers of a batch (dropout, stochastic depth) are seeded by `seed_of_batch`, so a resumed run repeats an
    uninterrupted one. If the processes of the task's group have different batches, gradients are averaged over them at
    each optimizer step.

    Args:
        task: what is trained.
        stage: the settings of the stage.
        state: progress of the run, updated during training.
        run: folder, device, seed and other settings.
        record: facts for checkpoints, in addition to weights, state and Lightning's own entries.

    Raises:
        GigamorphError: if a loss or gradient is not finite.
    """

    _loss: Any

    def __init__(self, task: Task, stage: Stage, state: State, run: Run, record: dict[str, Any]) -> None:
        super().__init__()
        self.net = task.module
        self.task, self.stage, self.state, self.run, self.record = task, stage, state, run, record
        self.batches = Batches(task, stage, state, run.seed)
        # Not registered as a child, or the network's parameters would be listed twice.
        self.__dict__["_loss"] = _data_parallel(task) if task.group.at_once > 1 else task.loss
        self._statistics = RunningStatistics(task.module, task.group)
        self._gradients: dict[str, Tensor] = {}
        self._counts = True
        self._average: dict[str, Any] | None = None
        self.average: Average | None = None
        self._steps = -(-self.batches.total // stage.accumulate)
        self._factor = factor_of(stage, self._steps)

    def train_dataloader(self) -> Batches:
        return self.batches

    def cpu(self) -> Self:
        """Do nothing: Lightning would move the network to the CPU at the end of each stage."""
        return self

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # pixel sources are read and uploaded tile by tile

    def configure_optimizers(self) -> torch.optim.Optimizer:
        made = make_optimizer(self.net, self.stage)
        if self.task.group.leads:
            log.debug(_learning_summary(self.net, self.stage, made))
        return made

    def on_train_start(self) -> None:
        train_mode(self.net, self.stage)
        for name, parameter in self.net.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}
        if self.stage.average is not None:
            self.average, self._average = Average(self.net, self.stage.average, self._average), None

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the network has the weights that are scored and saved: the averages, if enabled."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped()

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        group, size = self.task.group, self.stage.accumulate
        number = batch_idx * group.at_once + group.turn
        torch.manual_seed(seed_of_batch(self.run.seed, self.state.epoch, number, self.stage))
        self._statistics.begin()
        with self._accumulating(batch_idx):
            loss = self._loss(batch)
        self._counts = group.counts(batch_idx, self.batches.total)
        if not self._counts:
            return loss * 0  # a repeated batch, while other processes have their last one
        value = float(loss.detach())
        self._require_finite("loss", value, batch)
        self.state.losses.append(value)
        # Lightning divides by the size of a full step; the last step of an epoch may have fewer batches.
        together = min(size, self.batches.total - number // size * size)
        return loss if together == size else loss * (size / together)

    def on_after_backward(self) -> None:
        self._statistics.merge(self._counts)

    def _accumulating(self, batch_idx: int) -> contextlib.AbstractContextManager[Any]:
        """Context that delays the averaging of gradients over processes until an optimizer step follows."""
        done = batch_idx + 1
        last = done % self.trainer.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches
        return contextlib.nullcontext() if self.task.group.at_once == 1 or last else self._loss.no_sync()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        share = self._factor(self.state.within * self._steps + self._step)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * self.state.decay * share

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        learning = [p for p in self.net.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, math.inf if self.stage.clip is None else self.stage.clip))
        if self.run.precision != "fp16":  # fp16 scales the loss until the gradient is finite
            self._require_finite("gradient", norm)

    @property
    def _step(self) -> int:
        """Index of the optimizer step in the epoch."""
        return self.state.batch // self.stage.accumulate

    def _require_finite(self, what: str, value: float, batch: Sequence[Any] = ()) -> None:
        if not math.isfinite(value):
            if text := self.task.blame(batch):
                raise DataError(text)
            where = f"stage '{self.stage.name}', epoch {self.state.within + 1}, step {self._step + 1}"
            raise GigamorphError(f"{where}: the {what} is {value}; {remedy(self.run)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        group = self.task.group
        checkpoint["gigamorph"] = {
            **self.record,
            "state": self.state.stored(group.in_order(self.state.losses)),
            "task": self.task.state(),
            # During accumulation the gradients so far are part of the state.
            "gradients": {
                name: group.mean(p.grad.detach()).cpu()
                for name, p in self.net.named_parameters()
                if p.grad is not None and self.state.batch % self.stage.accumulate
            },
            **({} if self.average is None else {"average": self.average.stored()}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._gradients = checkpoint["gigamorph"]["gradients"]
        self._average = checkpoint["gigamorph"].get("average")


def _learning_summary(net: nn.Module, stage: Stage, optimizer: torch.optim.Optimizer) -> str:
    """A line for the log: the parameters that a stage trains, and their learning rates."""
    every = list(net.parameters())
    learning = [p for p in every if p.requires_grad]
    groups = (
        f"{len(group['params'])} at {group['lr']:g} with weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    )
    return (
        f"stage {stage.name}: {len(learning)} of {len(every)} parameters learn ({sum(p.numel() for p in learning):,} "
        f"numbers) by {type(optimizer).__name__}: {', '.join(groups)}"
    )


def remedy(run: Run) -> str:
    """The hint after a non-finite value: the last checkpoints, and what to change."""
    last, best = run.out / "last.ckpt", run.out / "best.ckpt"
    saved = f"{last} is the last checkpoint before it" if last.exists() else ""
    saved += f" and {best} is the best epoch, ready for use; " if saved and best.exists() else "; " * bool(saved)
    return f"{saved}train again with a lower lr, or check the images and labels"


def resume_hint(run: Run) -> str:
    """The hint of a failed run: how to continue it."""
    last = run.out / "last.ckpt"
    if not last.exists():
        return "no checkpoint was written before; start the run again"
    return f"{last} is complete; continue from it with --resume (resume=True in Python)"


class _Loss(nn.Module):
    """A task's loss as a module for DistributedDataParallel."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self._task = task.module, task

    def forward(self, batch: Sequence[Any]) -> Tensor:
        return self._task.loss(batch)


def _data_parallel(task: Task) -> nn.parallel.DistributedDataParallel:
    # A network may have parameters that an image does not use; DDP must not wait for their gradients.
    return nn.parallel.DistributedDataParallel(_Loss(task), gradient_as_bucket_view=True, find_unused_parameters=True)

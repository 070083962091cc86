"""The options that, with the data, determine the result of a run: `TrainOptions` and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..errors import GigamorphError
from ..tiling.memory import parse_bytes
from .stages import Stage


def require(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Refuse a number outside [least, below); None is accepted.

    Raises:
        GigamorphError: naming the option, also for NaN and infinity.
    """
    if value is not None and not least <= value < below:
        wanted = f"at least {least} and below {below}" if below < math.inf else f"{least} or more"
        raise GigamorphError(f"{name} must be {wanted}, not {value}")


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its options.

    Raises:
        GigamorphError: for invalid values.
    """

    name: str = "adamw"
    """A class of `torch.optim` (case-insensitive), or ``timm:NAME``."""
    lr: float = 1e-3
    weight_decay: float = 1e-4
    """Weight decay of weights; biases and norms do not decay."""
    momentum: float | None = None
    """Momentum of "sgd", 0.9 by default."""
    clip: float | None = 1.0
    """Maximum norm of the gradients of a step; 0 disables clipping."""
    layer_decay: float = 1.0
    """Factor of the learning rate of each part of the network, relative to the next part."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates by patterns of modules or parameters; the last matching pattern counts."""
    options: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the optimizer, such as betas."""

    def __post_init__(self) -> None:
        if self.momentum is None and self.name.lower() == "sgd":
            object.__setattr__(self, "momentum", Stage.momentum)
        for name in ("lr", "weight_decay", "clip", "layer_decay"):
            require(f"optimizer.{name}", getattr(self, name), 0)
        require("optimizer.momentum", self.momentum, 0, 1)
        for name, rate in self.rates.items():
            require(f"optimizer.rates.{name}", rate, 0)


@dataclass(frozen=True)
class Schedule:
    """The learning rate schedule; see `optimizers.factor_of`.

    Raises:
        GigamorphError: for invalid values.
    """

    name: str = "cosine"
    warmup: float = 0.1
    """Fraction of the steps in which the rate rises."""
    plateau: int | None = None
    """Divide the rate by ten after this many epochs without a better validation score."""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("schedule.warmup", self.warmup, 0, 1)
        require("schedule.plateau", self.plateau, 1)


@dataclass(frozen=True)
class Loss:
    """The loss function.

    Raises:
        GigamorphError: for invalid values.
    """

    class_weights: bool = False
    """Weight classes by their inverse frequency; for labels, weight the positives."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread over the classes (Szegedy et al., 2016)."""
    focal: float = 0.0
    """The exponent gamma of the focal loss (Lin et al., 2017); 0 for cross-entropy."""
    regression: Literal["squared", "absolute", "huber"] = "squared"
    """The loss of numbers, in units of their standard deviation."""

    def __post_init__(self) -> None:
        require("loss.label_smoothing", self.label_smoothing, 0, 1)
        require("loss.focal", self.focal, 0)


@dataclass(frozen=True)
class StageOptions:
    """A stage of the training; None takes the value of the run.

    Raises:
        GigamorphError: for invalid values.
    """

    epochs: int
    name: str = ""
    lr: float | None = None
    freeze: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require("stages.epochs", self.epochs, 1)
        require("stages.lr", self.lr, 0)


@dataclass(frozen=True)
class TrainOptions:
    """All options that, with the data, determine the result of a run; stored in the checkpoint.

    Raises:
        GigamorphError: for invalid values.
    """

    model: str = "resnet18"
    weights: str | None = None
    memory_budget: int | str | None = None
    """Bytes, or a string like "8GiB"; None uses the free memory."""
    batch_norm: Literal["frozen"] | None = None
    epochs: int = 20
    accumulate: int = 8
    """Images per optimizer step. Each image is a separate batch, because sizes differ."""
    precision: Precision = "fp32"
    patience: int | None = None
    """End the run after this many epochs without a better validation score."""
    seed: int = 0
    device: str = "cpu"
    freeze: tuple[str, ...] = ()
    """Patterns of frozen modules or parameters; the statistics of their BatchNorm are frozen too."""
    split_image: bool | int = False
    """Whether all processes share each image, with a band of rows per process; or how many processes share one."""
    average: float | None = None
    """Decay of an exponential moving average of the weights (EMA), which is then scored and saved as the best."""
    sampling: Literal["all", "balanced"] = "all"
    """"all": each image once per epoch; "balanced": equally many, drawn so that all classes are equally frequent."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    stages: tuple[StageOptions, ...] = ()
    """Consecutive stages, instead of a single one of ``epochs``."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "patience"):
            require(name, getattr(self, name), 1)
        require("average", self.average, 0, 1)
        require("seed", self.seed, 0, 2**32)  # the range of scikit-learn, which draws folds
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def made_stages(self, validated: bool) -> list[Stage]:
        """The stages for the training loop.

        Args:
            validated: whether there are validation images, which `plateau` and `patience` need.
        """
        own = self.optimizer
        whole = Stage(
            "train",
            self.epochs,
            own.lr,
            weight_decay=own.weight_decay,
            optimizer=own.name,
            optimizer_options=own.options,
            momentum=Stage.momentum if own.momentum is None else own.momentum,
            layer_decay=own.layer_decay,
            accumulate=self.accumulate,
            schedule=self.schedule.name,
            schedule_options=self.schedule.options,
            warmup=self.schedule.warmup,
            plateau=self.schedule.plateau if validated else None,
            patience=self.patience if validated else None,
            clip=own.clip or None,
            average=self.average,
            frozen=self.freeze,
            rates=tuple(own.rates.items()),
            batch_norm="trainable" if self.freeze else "train",
        )
        return [self._stage(whole, number, part) for number, part in enumerate(self.stages)] or [whole]

    def _stage(self, whole: Stage, number: int, part: StageOptions) -> Stage:
        frozen = self.freeze if part.freeze is None else part.freeze
        return replace(
            whole,
            name=part.name or f"stage{number + 1}",
            epochs=part.epochs,
            lr=whole.lr if part.lr is None else part.lr,
            frozen=frozen,
            batch_norm="trainable" if frozen else "train",
        )


Precision = Literal["fp32", "bf16", "fp16"]

AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types of PyTorch's autocast; "fp32" does not use it."""

LIGHTNING: dict[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}

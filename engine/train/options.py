"""What decides the result of a run besides the data: `TrainOptions` and its parts, which configurations fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import GigamorphError
from ..tiling.memory import parse_bytes
from .precision import Precision
from .stages import Stage


def require(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Refuse a number outside of a range; None is not set.

    Raises:
        GigamorphError: naming it; NaN and infinity are in no range.
    """
    if value is not None and not least <= value < below:
        told = f"at least {least} and below {below}" if below < math.inf else f"{least} or more"
        raise GigamorphError(f"{name} is {value}; it is {told}")


@dataclass(frozen=True)
class Optimizer:
    """How weights are changed.

    Raises:
        GigamorphError: for values that no optimizer has.
    """

    name: str = "adamw"
    """A class of `torch.optim`, in letters of any case, or ``timm:NAME``."""
    lr: float = 1e-3
    weight_decay: float = 1e-4
    """On weights, not on biases and norms."""
    momentum: float | None = None
    """Of "sgd", which takes 0.9 where none is set."""
    clip: float | None = 1.0
    """Largest norm of the gradients of a step; 0 for any."""
    layer_decay: float = 1.0
    """Each part of the network learns at so much of the rate of the part after it."""
    rates: dict[str, float] = field(default_factory=dict)
    """Rates of their own, by patterns of modules or parameters; the last that fits counts."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, as betas."""

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
    """How the learning rate goes; see `schedules.factor_of`.

    Raises:
        GigamorphError: for values that no schedule has.
    """

    name: str = "cosine"
    warmup: float = 0.1
    """Share of the steps over which the rate rises."""
    plateau: int | None = None
    """The rate is divided by ten after this many epochs without a better validation score."""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("schedule.warmup", self.warmup, 0, 1)
        require("schedule.plateau", self.plateau, 1)


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Raises:
        GigamorphError: for values that no loss has.
    """

    class_weights: bool = False
    """Weigh classes by the inverse of their frequency; of labels the positives."""
    label_smoothing: float = 0.0
    """Share of the truth that is spread over the classes (Szegedy et al., 2016)."""
    focal: float = 0.0
    """The exponent gamma of the focal loss (Lin et al., 2017); 0 for cross-entropy."""
    regression: Literal["squared", "absolute", "huber"] = "squared"
    """Of numbers, in units of their standard deviation."""

    def __post_init__(self) -> None:
        require("loss.label_smoothing", self.label_smoothing, 0, 1)
        require("loss.focal", self.focal, 0)


@dataclass(frozen=True)
class StageOptions:
    """A stage of the training; what is not set is as the whole run has it.

    Raises:
        GigamorphError: for values that no stage has.
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
    """Everything that decides the result of a run besides the data; stored in the checkpoint.

    Raises:
        GigamorphError: for values that no run has.
    """

    model: str = "resnet18"
    weights: str | None = None
    memory_budget: int | str | None = None
    """Bytes, or a text as "8GiB"; None lets the engine take what is free."""
    batch_norm: Literal["frozen"] | None = None
    epochs: int = 20
    accumulate: int = 8
    """Images per optimizer step. Each is a batch of its own, because their sizes differ."""
    precision: Precision = "fp32"
    patience: int | None = None
    """Epochs without a better validation score after which the run ends."""
    seed: int = 0
    device: str = "cpu"
    freeze: tuple[str, ...] = ()
    """Patterns of modules or parameters that do not learn; their BatchNorm keeps its statistics."""
    split_image: bool | int = False
    """Whether all processes share each image, a band of rows each, instead of having one each; or how many do."""
    average: float | None = None
    """Decay of an exponential moving average of the weights (EMA), which then is scored and kept as the best."""
    sampling: Literal["all", "balanced"] = "all"
    """"all": an epoch has each image once; "balanced": as many, drawn so that all classes are equally frequent."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    stages: tuple[StageOptions, ...] = ()
    """One after the other, in the place of a single one of ``epochs``."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "patience"):
            require(name, getattr(self, name), 1)
        require("average", self.average, 0, 1)
        require("seed", self.seed, 0, 2**32)  # scikit-learn, which draws folds, takes no other
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def made_stages(self, validated: bool) -> list[Stage]:
        """The stages as the training loop takes them.

        Args:
            validated: whether there are validation images, without which nothing can be waited for.
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

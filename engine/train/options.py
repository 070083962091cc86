"""The options of training, each declared once; without PyTorch, so that the command line can list them quickly.

`TrainOptions` determines the result of a run, `TrainConfig` is the configuration of `gigamorph train`, and `Stage` is a
stage of the training loop. Options that files have in the tables of `TrainConfig` and directly in the stages of recipes
are in bases of both. Fields of the last base come first.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal

from ..errors import GigamorphError

Precision = Literal["fp32", "bf16", "fp16"]
Numbers = float | tuple[float, ...]
Kind = Literal["classes", "labels", "ordinal", "numbers", "masks"]
Views = Literal["mean", "max", "attention"]  # as in `models.outputs`, which imports PyTorch


def limited(default: Any, least: float, below: float = math.inf) -> Any:
    """A field with values in [least, below), which `check_limits` checks."""
    return field(default=default, metadata={"limits": (least, below)})


def check_limits(options: Any, table: str = "") -> None:
    """Refuse values outside the limits of their fields; None is accepted.

    Raises:
        GigamorphError: naming the option in its table of a file.
    """
    for own in fields(options):
        if "limits" in own.metadata:
            require(f"{table}{own.name}", getattr(options, own.name), *own.metadata["limits"])


def require(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Refuse a number outside [least, below); None is accepted.

    Raises:
        GigamorphError: naming the option, also for NaN and infinity.
    """
    if value is not None and not least <= value < below:
        wanted = f"at least {least} and below {below}" if below < math.inf else f"{least} or more"
        raise GigamorphError(f"{name} must be {wanted}, not {value}")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Options of the optimizer that `Optimizer` and `Stage` share.

    Attributes:
        weight_decay: decay of weights, not of biases and norms. "adam" and "sgd" add it to the gradient, "adamw"
            decouples it.
        momentum: Nesterov momentum of "sgd", 0.9 by default; 0 for none.
        clip: maximum norm of the gradients of a step; 0 disables clipping.
        layer_decay: factor of the learning rate of each part of the network (a block of layers, see
            `optimizers.parts`), relative to the next part; the last part has ``lr``.
    """

    weight_decay: float = limited(1e-4, 0)
    momentum: float | None = limited(None, 0, 1)
    clip: float | None = limited(1.0, 0)
    layer_decay: float = limited(1.0, 0)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Options of the schedule that `Schedule` and `Stage` share.

    Attributes:
        warmup: fraction of the steps in which the rate rises; None means 0.1, or 0 for "constant".
        plateau: divide the rate by ten after this many epochs without a better validation score.
    """

    warmup: float | None = limited(0.1, 0, 1)
    plateau: int | None = limited(None, 1)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of the training loop that `TrainOptions` and `Stage` share.

    Attributes:
        accumulate: images per optimizer step. Each image is a separate batch, because sizes differ.
        patience: stop after this many epochs without a better validation score.
        average: decay of an exponential moving average of the weights (EMA), which is then scored and saved as the
            best.
    """

    accumulate: int = limited(8, 1)
    patience: int | None = limited(None, 1)
    average: float | None = limited(None, 0, 1)


@dataclass(frozen=True)
class _StageLength:
    name: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Stage(UpdateOptions, ScheduleOptions, LoopOptions, _StageLength):
    """One stage, with a new optimizer; patterns are matched against names by `fnmatch`.

    Its defaults are those of the published methods, whose files and programs omit them.

    Attributes:
        trainable: patterns of trainable parameters, or of modules with all their parameters; all others are frozen.
        frozen: patterns of exceptions that are frozen.
        rates: patterns of parameters with a learning rate that replaces ``lr``; the last matching pattern counts.
        undecayed: patterns of parameters without weight decay.
        optimizer: a class of `torch.optim` (case-insensitive), or ``timm:NAME``.
        optimizer_options: additional arguments of the optimizer, such as betas.
        accumulate: batches per optimizer step, whose losses are averaged.
        schedule: "constant"; "cosine" and "linear", which fall to zero; or others, see `optimizers.factor_of`.
        schedule_options: additional arguments of the schedule.
        dropout: probability of all dropout layers; None leaves them unchanged.
        batch_norm: "eval": all layers use their running statistics, unchanged; "trainable": only layers with frozen
            weights do.
    """

    _: KW_ONLY
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip: float | None = None
    warmup: float | None = None
    accumulate: int = 1
    trainable: tuple[str, ...] = ("*",)
    frozen: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    undecayed: tuple[str, ...] = ()
    optimizer: str = "adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    schedule: str = "constant"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    dropout: float | None = None
    batch_norm: Literal["train", "eval", "trainable"] = "train"


@dataclass(frozen=True)
class _OptimizerName:
    name: str = "adamw"
    lr: float = limited(1e-3, 0)


@dataclass(frozen=True)
class Optimizer(UpdateOptions, _OptimizerName):
    """The optimizer and its options.

    Attributes:
        name: a class of `torch.optim` (case-insensitive), or ``timm:NAME``.
        lr: learning rate.
        rates: learning rate of some modules, as in classifier=1e-3; the last match counts.
        options: additional arguments of the optimizer, such as betas.

    Raises:
        GigamorphError: for invalid values.
    """

    rates: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.momentum is None and self.name.lower() == "sgd":
            object.__setattr__(self, "momentum", Stage.momentum)
        check_limits(self, "optimizer.")
        for name, rate in self.rates.items():
            require(f"optimizer.rates.{name}", rate, 0)


@dataclass(frozen=True)
class _ScheduleName:
    name: str = "cosine"


@dataclass(frozen=True)
class Schedule(ScheduleOptions, _ScheduleName):
    """The learning rate schedule; see `optimizers.factor_of`.

    Raises:
        GigamorphError: for invalid values.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits(self, "schedule.")


@dataclass(frozen=True)
class Loss:
    """The loss function.

    Attributes:
        class_weights: weigh classes in the loss by the inverse of their frequency; for labels, weigh the positives.
        label_smoothing: fraction of the target that is spread over the classes (Szegedy et al., 2016).
        focal: the exponent gamma of the focal loss (Lin et al., 2017); 0 for cross-entropy.
        regression: the loss of numbers, in units of their standard deviation.

    Raises:
        GigamorphError: for invalid values.
    """

    class_weights: bool = False
    label_smoothing: float = limited(0.0, 0, 1)
    focal: float = limited(0.0, 0)
    regression: Literal["squared", "absolute", "huber"] = "squared"

    def __post_init__(self) -> None:
        check_limits(self, "loss.")


@dataclass(frozen=True)
class StageOptions:
    """A stage of the training; None takes the value of the run.

    Raises:
        GigamorphError: for invalid values.
    """

    epochs: int = field(metadata={"limits": (1,)})
    name: str = ""
    lr: float | None = limited(None, 0)
    freeze: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_limits(self, "stages.")


@dataclass(frozen=True)
class _Network:
    model: str = "resnet18"
    weights: str | None = None
    memory_budget: int | str | None = None
    batch_norm: Literal["frozen"] | None = None


@dataclass(frozen=True)
class TrainOptions(LoopOptions, _Network):
    """All options that, with the data, determine the result of a run; stored in the checkpoint.

    Attributes:
        weights: start from these weights: a safetensors or torch file.
        memory_budget: memory for a step, as in 4GiB, or bytes; by default the free memory.
        batch_norm: keep the running statistics of BatchNorm layers: needs less memory and time than those of the whole
            image.
        epochs: passes over the training images.
        precision: autocast type.
        seed: random seed.
        device: device to compute on.
        freeze: freeze modules, as in layer1 or blocks.[0-2], including their BatchNorm statistics.
        split_image: split each image between the devices instead, in bands of rows.
        sampling: "all": each image once per epoch; "balanced": equally many, drawn so that all classes are equally
            frequent.
        stages: consecutive stages, instead of a single one of ``epochs``.

    Raises:
        GigamorphError: for invalid values.
    """

    epochs: int = limited(20, 1)
    precision: Precision = "fp32"
    seed: int = limited(0, 0, 2**32)  # the range of scikit-learn, which draws folds
    device: str = "cpu"
    freeze: tuple[str, ...] = ()
    split_image: bool | int = False  # a number splits it between that many of the devices
    sampling: Literal["all", "balanced"] = "all"
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    stages: tuple[StageOptions, ...] = ()

    def __post_init__(self) -> None:
        check_limits(self)
        _ = self.budget

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        from ..tiling.memory import parse_bytes  # imports PyTorch

        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def made_stages(self, validated: bool) -> list[Stage]:
        """The stages for the training loop.

        Args:
            validated: whether there are validation images, which `plateau` and `patience` need.
        """
        own, made = self.optimizer, list[Stage]()
        shared = _shared(own, UpdateOptions) | _shared(self.schedule, ScheduleOptions) | _shared(self, LoopOptions)
        shared["momentum"] = Stage.momentum if own.momentum is None else own.momentum
        shared["clip"] = own.clip or None
        if not validated:
            shared["plateau"] = shared["patience"] = None
        for number, part in enumerate(self.stages or [StageOptions(self.epochs, "train")]):
            frozen = self.freeze if part.freeze is None else part.freeze
            stage = Stage(
                part.name or f"stage{number + 1}",
                part.epochs,
                own.lr if part.lr is None else part.lr,
                optimizer=own.name,
                optimizer_options=own.options,
                rates=tuple(own.rates.items()),
                schedule=self.schedule.name,
                schedule_options=self.schedule.options,
                frozen=frozen,
                batch_norm="trainable" if frozen else "train",
                **shared,
            )
            made.append(stage)
        return made


def _shared(options: Any, base: type[UpdateOptions | ScheduleOptions | LoopOptions]) -> dict[str, Any]:
    return {own.name: getattr(options, own.name) for own in fields(base)}


@dataclass(frozen=True)
class Labels:
    """The labels of a table that are learnt.

    Attributes:
        kind: see `Target`.
        names: for "labels" and "numbers" the NAMEs of columns label_NAME; by default all.
        classes: for "classes" and "ordinal" their names in order, by default those of `read_table`; for "masks" the
            names of 0, 1, ...
        views: how the views of an exam (patient, exam_id) are combined, see `Target`; None takes single images.
    """

    kind: Kind = "classes"
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    views: Views | None = None


@dataclass(frozen=True)
class DataOptions:
    """How the images of a table are prepared, and which of its labels are learnt.

    Attributes:
        task: "classes": one of several classes; "labels": any of the columns label_NAME; "ordinal": ordered classes;
            "numbers": values of label_NAME; "masks": a class for each pixel, in the files of mask_path.
        labels: columns to learn for the tasks labels and numbers, without label_; by default all.
        classes: names of the classes in their order; by default those of the table, sorted. For "masks" the names of
            the values 0 (background), 1, ...; by default as many as the masks have.
        columns: other names of the table's columns: {"label": "cancer"} reads its column cancer as label.
        channels: input channels of the model.
        mean: grey value that maps to zero, from 0 (black) to 1 (white); one number, or one per channel. auto for mean
            and std measures both on a sample of the training images.
        std: standard deviation that maps to one; or auto.
        voi: grey scale of DICOM images: auto, none, minmax, window:I or lut:I.
        for_processing: accept DICOM images marked FOR PROCESSING.
        white: white level of PNG, TIFF and other non-DICOM files: a number, as in 4095 for 12 bits in a 16-bit PNG, or
            auto for the bits that each image uses; by default the largest value of the file's type.
        augment: augment training images at random up to the given limits, with commas between: flip, rotate=10
            (degrees), scale=0.1, shear=5 (degrees), translate=64 (pixels), elastic=20 (pixels), gamma=0.2,
            contrast=0.1, brightness=0.05, noise=0.01.
        downsample: average this many pixels in both directions, as a baseline with lower resolution.
        skip_bad: read all images first, and leave out unreadable ones.
        views: use all images of an exam (patient_id, exam_id) as one sample, and combine its views like this: by the
            mean of their logits, their maximum, or attention over the views.
        folds: cross-validation by patient: N runs, in fold1 ...; predict accepts OUT as the mean of their networks.

    Raises:
        GigamorphError: for invalid values.
    """

    task: Kind = "classes"
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    channels: Literal[1, 3] = 1
    mean: Numbers | Literal["auto"] = 0.0
    std: Numbers | Literal["auto"] = 1.0
    voi: str = "auto"
    for_processing: bool = False
    white: float | str | None = None
    augment: str | None = None
    downsample: int = limited(1, 1)
    skip_bad: bool = False
    views: Views | None = None
    folds: int | None = limited(None, 2)

    def __post_init__(self) -> None:
        if (self.mean == "auto") != (self.std == "auto"):
            raise GigamorphError("data.mean and data.std must both be auto, or neither")
        check_limits(self, "data.")


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """The configuration of a run of `gigamorph train`.

    Attributes:
        init: fine-tune a weights file; a folder of gigamorph import, with its model and, unless given, channels, mean,
            std and voi; or timm:NAME, with the pretrained weights that timm fetches.
        devices: train on this many GPUs, or CPU processes: one image on each at a time, with averaged gradients.
        devices_per_image: split each image between N of the devices, and average gradients over the groups.
        timeout: time limit for waiting on other processes; the error names the missing process.
        log: logger in addition to log.csv: csv, tensorboard, wandb, mlflow, or module:name for Lightning.
        callbacks: Lightning callback, as module:name.

    Raises:
        GigamorphError: for invalid values.
    """

    init: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | None = limited(None, 1)
    devices_per_image: int | None = limited(None, 1)
    timeout: float = limited(7200.0, 1)  # seconds
    log: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        from ..images.grayscale import check_voi  # imports PyTorch

        super().__post_init__()
        check_voi(self.data.voi)
        self.data_arguments()
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Refuse options without effect, and duplicate names."""
        if self.stages and self.epochs != TrainOptions.epochs:
            raise GigamorphError(
                f"epochs is {self.epochs}, but each stage has its own epochs; leave it out, or set those of the stages"
            )
        of_numbers = self.data.task == "numbers"
        for name in ("class_weights", "label_smoothing", "focal") if of_numbers else ("regression",):
            if getattr(self.loss, name) != getattr(Loss(), name):
                what = "classes and labels, not to numbers" if of_numbers else "--task numbers; leave it out"
                raise GigamorphError(f"loss.{name} applies only to {what}")
        optimizer = self.optimizer.name
        if self.optimizer.momentum is not None and optimizer.lower() != "sgd":
            raise GigamorphError(
                f"optimizer.momentum applies only to sgd; set the momentum of {optimizer}, if any, in optimizer.options"
            )
        for name, tasks in (("labels", ("labels", "numbers")), ("classes", ("classes", "ordinal", "masks"))):
            if getattr(self.data, name) and self.data.task not in tasks:
                listed = f"{', '.join(tasks[:-1])} and {tasks[-1]}"
                raise GigamorphError(f"data.{name} applies only to --task {listed}; leave it out, or set data.task")
        for name in ("labels", "classes"):
            given = getattr(self.data, name)
            if twice := [one for number, one in enumerate(given) if one in given[:number]]:
                raise GigamorphError(f"data.{name} names {twice[0]!r} twice; name each once")

    @property
    def split(self) -> bool | int:
        """The value of `TrainOptions.split_image`."""
        return self.devices_per_image or self.split_image

    def options(self) -> TrainOptions:
        """The options for `fit`."""
        values = {own.name: getattr(self, own.name) for own in fields(TrainOptions)}
        values["split_image"] = self.split
        return TrainOptions(**values)

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `training_data`, without the table.

        Raises:
            GigamorphError: for invalid values.
        """
        from ..datasets.augment import Augment
        from ..images.levels import parse_white
        from ..images.pixels import Normalize

        own = self.data
        normalize: Any = "auto" if own.mean == "auto" else Normalize(_numbers(own.mean), _numbers(own.std))
        return {
            "labels": Labels(own.task, own.labels, own.classes, own.views),
            "columns": own.columns,
            "channels": own.channels,
            "normalize": normalize,
            "voi": own.voi,
            "downsample": own.downsample,
            "for_processing": own.for_processing,
            "white": None if own.white is None else parse_white(str(own.white)),
            "augment": None if own.augment is None else Augment.parse(own.augment),
            "skip_bad": own.skip_bad,
            "seed": self.seed,
        }


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (float(value),)

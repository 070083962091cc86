"""What MorphHR can be told; the defaults are those of ``configs/morphhr.toml``, which names their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import GigamorphError
from ...train.stages import Stage
from ..splits import SplitOf

Arm = Literal["finetune", "direct", "scratch", "morph"]


@dataclass(frozen=True)
class Config:
    """MorphHR: fine-tune at low resolution, morph the front, go on at high resolution."""

    model: str = "resnet50"
    weights: str = "resnet50-0676ba61.pth"
    """A file of weights that the parent starts from, or "random"; its classifier may have other outputs."""
    channels: int = 3
    mean: tuple[float, ...] = (0.449,)
    std: tuple[float, ...] = (0.226,)
    voi: str = "auto"
    split: SplitOf = "table"
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Of the patients, for train, val and test, where they are drawn."""
    task: Literal["classes", "labels"] = "classes"
    """"classes": the column label; "labels": columns label_NAME, any of which an image may have."""
    labels: tuple[str, ...] = ()
    """Which of them; empty for all."""
    factor: int = 4
    """How many times as large the child's images are, along each side."""
    front: Literal["stages", "fold", "residual"] = "stages"
    filters: int = 16
    act: str = "ReLU"
    """Of the P-activations: between the stages of the front, and after inserted layers."""
    widen: float | None = None
    """Every channel space of the child that can grow becomes this many times as wide."""
    deepen: tuple[str, ...] = ()
    """Modules of the parent that get one more 3x3 convolution with a P-activation in the child."""
    deepen_by: Literal["identity", "netmorph"] = "identity"
    """"identity": the new convolution is the identity after the module; "netmorph": the module, a convolution, is split
    into two dense ones which together are what it was."""
    arms: tuple[Arm, ...] = ("morph",)
    """Which networks are trained on: "finetune" ends with the parent, "direct" trains the parent itself on at full
    resolution, "scratch" has a new front and stem, "morph" has the morphed front. All four are the ablation."""
    augment: str = "flip,rotate=25,scale=0.2,shear=11.5"
    balanced: bool = False
    """Weigh images so that the classes of a batch count the same."""
    flips: bool = True
    """Average predictions over the mirrored images that the augmentation draws."""
    low: tuple[Stage, ...] = (Stage("finetune", 20, 1e-4, weight_decay=1e-4, batch_size=8),)
    high: tuple[Stage, ...] = (
        Stage("high", 20, 1e-5, weight_decay=1e-4, batch_size=1, accumulate=8, batch_norm="eval"),
    )

    direct: tuple[Stage, ...] = ()
    """Of the arm of that name; empty for those of `high`."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise GigamorphError(f"factor = {self.factor} must be 2 or more")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise GigamorphError("arms must name one at least of finetune, direct, scratch, morph, and none twice")
        if not self.low or not self.high:
            raise GigamorphError("low and high need one stage each at least")
        if self.labels and self.task == "classes":
            raise GigamorphError('labels are named, but task is "classes"; set task = "labels"')

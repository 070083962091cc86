"""Options of MorphHR; the defaults are those of ``configs/morphhr.toml``, which lists their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....errors import GigamorphError
from ....train.stages import Stage
from ..defaults import published
from ..splits import ImagesConfig

Arm = Literal["finetune", "direct", "scratch", "morph"]


@dataclass(frozen=True)
class MorphHRConfig(ImagesConfig):
    """MorphHR: fine-tune at low resolution, morph the front, continue at high resolution."""

    model: str = "resnet50"
    weights: str = "resnet50-0676ba61.pth"
    """Weights file from which the parent starts, or "random"; its classifier may have other outputs."""
    mean: tuple[float, ...] = (0.449,)
    std: tuple[float, ...] = (0.226,)
    task: Literal["classes", "labels"] = "classes"
    """"classes": the column label; "labels": columns label_NAME, of which an image may have several."""
    labels: tuple[str, ...] = ()
    """Names of labels to use; empty for all."""
    factor: int = 4
    """Ratio of the child's image sides to the parent's."""
    front: Literal["stages", "fold", "residual"] = "stages"
    filters: int = 16
    act: str = "ReLU"
    """Activation of the P-activations: between the stages of the front, and after inserted layers."""
    widen: float | None = None
    """Widening factor of every channel space of the child that can grow."""
    deepen: tuple[str, ...] = ()
    """Modules of the parent after which the child gets one more 3x3 convolution with a P-activation."""
    deepen_by: Literal["identity", "netmorph"] = "identity"
    """"identity": the new convolution is the identity; "netmorph": the module, a convolution, is split into two dense
    convolutions with the same product."""
    arms: tuple[Arm, ...] = ("morph",)
    """Networks to train further: "finetune" ends with the parent, "direct" trains the parent itself at full
    resolution, "scratch" has a new front and stem, "morph" has the morphed front. All four are the ablation."""
    augment: str = "flip,rotate=25,scale=0.2,shear=11.5"
    balanced: bool = False
    """Weight images so that the classes of a batch have equal weight."""
    flips: bool = True
    """Average predictions over the mirrored images that the augmentation draws."""
    low: tuple[Stage, ...] = published("morphhr", "low", Stage)
    high: tuple[Stage, ...] = published("morphhr", "high", Stage)

    direct: tuple[Stage, ...] = ()
    """Stages of the arm of that name; empty for those of `high`."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise GigamorphError(f"factor = {self.factor} must be 2 or more")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise GigamorphError("arms must have at least one of finetune, direct, scratch, morph, each at most once")
        if not self.low or not self.high:
            raise GigamorphError("low and high must have at least one stage each")
        if self.labels and self.task == "classes":
            raise GigamorphError('labels are set, but task is "classes"; set task = "labels"')

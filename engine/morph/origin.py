"""Original network of a grown file: find its outputs and channels, and build the grown network from it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError, MorphError
from ..models import build_model
from ..models.registry import head_prefix
from .files import SUFFIXES, read_weights, recipe_of
from .head import HeadStep, SplitClassStep
from .inputs import InputsStep
from .recipe import Recipe, apply, matches


@dataclass(frozen=True)
class Origin:
    """The morphs of a grown network, and the outputs and image channels of its original network."""

    recipe: Recipe
    classes: int
    channels: int

    @classmethod
    def of_file(cls, spec: str, weights: str | Path, channels: int) -> Origin | None:
        """Find the origin of the network in a weights file; None if that network never grew.

        Args:
            spec: the original network, see `create_model`.
            weights: a file of `gigamorph morph`, or a checkpoint of a grown network that was trained.
            channels: image channels of the grown network.

        Raises:
            MorphError: the file cannot be read, or its network was not grown from `spec`.
            DataError: its network has another number of image channels.
        """
        recipe = recipe_of(weights) if Path(weights).is_file() else Recipe()
        if not recipe.morphs:
            return None
        inputs = [m.step for m in recipe.morphs if isinstance(m.step, InputsStep)]
        if inputs and inputs[-1].channels != channels:
            raise DataError(f"{weights}: its network takes images of {inputs[-1].channels} channels, not {channels}")
        began = len(inputs[0].matrix) if inputs else channels
        head = head_prefix(build_model(spec, 2, began).state_dict())
        rows = {t.shape[0] for name, t in read_weights(weights).items() if name.startswith(head) and t.ndim >= 2}
        heads = any(isinstance(m.step, HeadStep | SplitClassStep) for m in recipe.morphs)
        for classes in range(1, max(rows, default=1) + 1) if heads else sorted(rows):
            if matches(recipe, build_model(spec, classes, began)):
                return cls(recipe, classes, began)
        raise MorphError(
            f"{weights}: its network was not grown from {spec!r} with {began} image channels; give the model that the "
            "first gigamorph morph received"
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Origin:
        """Restore an origin from the data of `record`."""
        return cls(Recipe.from_json(record["recipe"]), record["classes"], record["channels"])

    def record(self) -> dict[str, Any]:
        """Return the origin as plain data for a checkpoint."""
        return {"recipe": self.recipe.to_json(), "classes": self.classes, "channels": self.channels}

    def build(self, spec: str, classes: int | None = None) -> nn.Module:
        """Build the grown network with random weights; another number of outputs replaces its last layer."""
        network = apply(self.recipe, build_model(spec, self.classes, self.channels))
        if classes is not None:
            _set_outputs(network, classes)
        return network


def create_grown(spec: str, classes: int, channels: int) -> nn.Module:
    """Create a model like `create_model`; ``resnet18+wide.safetensors`` loads the grown network of that file.

    Raises:
        GigamorphError: the network is unknown, or the file's network was not grown from it.
    """
    base, plus, file = spec.rpartition("+")
    if not plus or Path(file).suffix not in (*SUFFIXES, ".ckpt"):
        return build_model(spec, classes, channels)
    origin = Origin.of_file(base, file, channels)
    if origin is None:
        raise MorphError(f"{file}: contains no recipe of a grown network; omit it, or give a file of gigamorph morph")
    network = origin.build(base)
    network.load_state_dict(read_weights(file))
    return network


def _set_outputs(network: nn.Module, classes: int) -> None:
    path = head_prefix(network.state_dict()).removesuffix(".")
    head = network.get_submodule(path)
    if isinstance(head, nn.Linear) and head.out_features != classes:
        network.set_submodule(path, nn.Linear(head.in_features, classes, head.bias is not None))
    elif isinstance(head, nn.Conv2d) and head.out_channels != classes:
        new = nn.Conv2d(head.in_channels, classes, head.kernel_size, head.stride, bias=head.bias is not None)  # pyright: ignore
        network.set_submodule(path, new)

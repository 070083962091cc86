"""Files of grown networks: save and open weights with their recipe, compare two networks, find the original one.

A safetensors file stores the recipe in its header, so it is complete; `b.recipe.json` in the same folder repeats the
text for people. The recipe of a torch file is only in `b.pt.recipe.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, MorphError
from ..models import build_model
from ..models.folder import is_folder, read_description
from ..models.registry import head_prefix, open_checked
from ..models.weights import differences
from .front import FrontStep, downsampler
from .head import HeadStep, OldOutputs, SplitClassStep, outputs_on
from .inputs import InputsStep, Mix
from .recipe import Recipe, apply, matches
from .step import Difference, Report, Step
from .store import SafetensorsFile, atomic, read_state, read_torch, write_state
from .verify import FLOAT64_LIMIT, NOISE_RATIO, compare
from .volume import SLICES, VolumeStep

SUFFIXES = (".safetensors", ".pt", ".pth")
ENDING = ".recipe.json"
SIDE = 64  # side of the images for checks, before any front
PREFIXES = ("net.", "module.")  # of names in a checkpoint of gigamorph train, and of DistributedDataParallel


@dataclass
class Grown:
    """A network with its weights, and the recipe of the morphs that built it."""

    network: nn.Module
    recipe: Recipe = field(default_factory=Recipe)
    channels: int = 1  # channels of its input images

    @property
    def shrink(self) -> int:
        """Factor by which its fronts enlarged the images, relative to the original network."""
        product = 1
        for morph in self.recipe.morphs:
            product *= morph.step.r if isinstance(morph.step, FrontStep) else 1
        return product

    def example(self, size: tuple[int, int] | None = None) -> Tensor:
        """Create a blank image for checks, (1, C, H, W) or a volume of some slices, in the dtype of the weights."""
        side = SIDE * self.shrink
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)
        depth = (SLICES,) if any(isinstance(morph.step, VolumeStep) for morph in self.recipe.morphs) else ()
        return torch.zeros(1, self.channels, *depth, *(size or (side, side)), dtype=dtype)


def recipe_path(weights: str | Path) -> Path:
    """Return `b.recipe.json` for `b.safetensors` and `b.pt.recipe.json` for `b.pt`, so that no two files share one."""
    path = Path(weights)
    return path.with_suffix(ENDING) if path.suffix == ".safetensors" else path.with_name(path.name + ENDING)


def open_network(spec: str, weights: str | Path | None, classes: int = 2, channels: int = 1) -> Grown:
    """Build a network, repeat the morphs of its recipe if it has one, and load its weights.

    Args:
        spec: the original network before any morph, see `create_model`.
        weights: the weights file, or the recipe file next to it. With None the weights are random, or those of the
            folder `spec`.
        classes: number of outputs of the original network.
        channels: image channels of the original network.

    Raises:
        GigamorphError: the network is unknown, the code of a folder changed since its import, or the file is missing,
            damaged or belongs to another network; the message names it.
    """
    if is_folder(spec):
        channels = read_description(spec).preprocessing.channels
        open_checked(spec)  # growth must start from the function that the import checked
    if weights is None:
        return Grown(build_model(spec, classes, channels), channels=channels)
    path = _weights_path(Path(weights))
    state = read_weights(path)
    network = build_model(spec, classes, channels)
    recipe = recipe_of(path)
    try:
        network = apply(recipe, network) if recipe.morphs else network
        _load(network, state)
    except MorphError as error:
        raise MorphError(f"{path}: {error}") from error
    steps = [m.step for m in recipe.morphs if isinstance(m.step, InputsStep)]
    return Grown(network, recipe, steps[-1].channels if steps else channels)


def add_morph(parent: Grown, child: nn.Module, report: Report) -> Grown:
    """Return the child with the parent's recipe plus one morph."""
    recipe = Recipe(list(parent.recipe.morphs))
    recipe.add(report, parent.network, child)
    step = report.step
    return Grown(child, recipe, step.channels if isinstance(step, InputsStep) else parent.channels)


def save_network(path: str | Path, grown: Grown) -> Path:
    """Write weights and recipe; either both files are replaced or neither.

    Returns:
        The path of the recipe.

    Raises:
        MorphError: a file cannot be written.
    """
    check_target(path)
    text = grown.recipe.to_json()
    target = recipe_path(path)
    with atomic(target) as file:  # replaces its target after the weights have replaced theirs
        file.write(text.encode())
        write_state(path, grown.network.state_dict(), {"recipe": text})
    return target


def check_target(path: str | Path) -> None:
    """Raise early if `path` cannot be written."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise MorphError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise MorphError(f"{path}: the folder {path.parent} does not exist; create it first")


def compare_networks(parent: Grown, child: Grown, size: tuple[int, int] | None = None) -> Difference:
    """Compare two networks by the relation that their recipes define, child(x) against parent(transformed x).

    A front shrinks the images for the parent, and changed inputs mix its channels. A grown head is compared in its old
    outputs (in their probabilities if a class was split).

    Args:
        parent: the first network.
        child: the second network. Its recipe continues the parent's, or both networks have the same inputs and outputs.
        size: (height, width) of the child's images.

    Raises:
        MorphError: the recipes do not relate the networks, or a network cannot be run.
    """
    ours, theirs = ([m.step for m in g.recipe.morphs] for g in (parent, child))
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    if any(isinstance(step, _RELATED) for step in ours[common:]):
        raise MorphError("the second network's recipe does not continue the first's; give the networks in that order")
    steps = theirs[common:]
    example = child.example(size)
    one, other = _heads(_shrunk(parent.network, steps), child.network, steps, example)
    return compare(one, other, example)


def verdict(difference: Difference) -> tuple[bool, str]:
    """Return whether two networks are equal in eval mode, and a line that describes how equal they are.

    Computed weights (folded normalisation, factors of a kernel) are rounded once when they are stored. This changes the
    function by about the rounding of a float32 forward, also if it runs in float64.
    """
    d = difference
    evaluated = _level(d.float64_eval, d.float32_eval, d.noise_eval)
    trained = evaluated
    if d.float64_train is not None and d.float32_train is not None and d.noise_train is not None:
        trained = _level(d.float64_train, d.float32_train, d.noise_train)
    if evaluated == _DIFFERENT:
        return False, f"different: by {d.float64_eval:.1e}, the first one's own rounding noise is {d.noise_eval:.1e}"
    if trained == _DIFFERENT:
        return True, f"equal in eval mode; in train mode they differ by {d.float64_train:.1e}"
    return True, "equal" if evaluated == trained == _EQUAL else "equal up to the rounding of the stored weights"


_EQUAL, _ROUNDED, _DIFFERENT = range(3)


def _level(float64: float, float32: float, noise: float) -> int:
    limit = NOISE_RATIO * noise
    if float64 <= FLOAT64_LIMIT and float32 <= limit:
        return _EQUAL
    # In float32 the rounding of the weights and the rounding of the forward add up.
    return _ROUNDED if float64 <= limit and float32 <= 2 * limit else _DIFFERENT


_RELATED = (FrontStep, InputsStep, HeadStep, SplitClassStep)


def _shrunk(network: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """Return the parent behind the transforms of its images."""
    for step in steps:
        if isinstance(step, FrontStep):
            network = nn.Sequential(downsampler(step.downsample, step.r), network)
        elif isinstance(step, InputsStep):
            network = nn.Sequential(Mix(step.matrix, step.offset, 2), network)
    return network


def _heads(parent: nn.Module, child: nn.Module, steps: Sequence[Step], example: Tensor) -> tuple[nn.Module, nn.Module]:
    """Wrap both networks so that they return the outputs that the growth of heads preserves."""
    heads = [step for step in steps if isinstance(step, HeadStep | SplitClassStep)]
    if not heads:
        return parent, child
    split = any(isinstance(step, SplitClassStep) for step in heads)
    softmax = split or any(step.kind == "softmax" for step in heads if isinstance(step, HeadStep))
    width = outputs_on(parent, example)[0].shape[1]
    undo: list[tuple[int, int | None]] = []
    for step in heads:
        parts = isinstance(step, SplitClassStep)
        undo.append((width, step.index if parts else None))
        width = width + len(step.shares) - 1 if parts else step.outputs
    one, other = (OldOutputs(n, [1], [u], softmax, split) for n, u in ((parent, []), (child, undo[::-1])))
    return one, other


def _weights_path(path: Path) -> Path:
    """Return the weights file that belongs to a recipe file; any other path is returned unchanged."""
    if not path.name.endswith(ENDING):
        return path
    name = path.name.removesuffix(ENDING)
    weights = path.with_name(name if Path(name).suffix in SUFFIXES else f"{name}.safetensors")
    if not weights.is_file():
        raise MorphError(f"{path}: its weights {weights.name} are missing; put them in the same folder")
    return weights


def recipe_of(weights: str | Path) -> Recipe:
    """Read the recipe in a weights file or checkpoint, or next to it; it is empty if the network never grew."""
    weights = Path(weights)
    if weights.suffix == ".safetensors":
        text = SafetensorsFile(weights).metadata.get("recipe")
        if text is not None:
            return _recipe_in(text, weights)
    elif weights.suffix == ".ckpt":  # of gigamorph train
        found = read_torch(weights)
        record = found.get("gigamorph") if isinstance(found, dict) else None
        grown = record.get("grown") if isinstance(record, dict) else None
        if grown is None:
            return Recipe()
        return _recipe_in(grown.get("recipe") if isinstance(grown, dict) else None, weights)
    target = recipe_path(weights)
    return Recipe.load(target) if target.exists() else Recipe()


def _recipe_in(text: Any, weights: Path) -> Recipe:
    if not isinstance(text, str):
        raise MorphError(f"{weights}: key 'grown.recipe' is missing or not a string; use another copy of the file")
    try:
        return Recipe.from_json(text)
    except MorphError as error:
        raise MorphError(f"{weights}: {error}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read all weights of a file, under the names that they have in the network."""
    state = dict(read_state(path))
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all weights in the dtype of the file; BatchNorm's counter may be missing, as in older files."""
    own = network.state_dict()
    state |= {n: t for n, t in own.items() if n not in state and n.endswith("num_batches_tracked")}
    if problems := differences(own, state):
        raise MorphError(
            f"the weights do not fit the network: {'; '.join(problems)}; give the model, classes and channels of the "
            "original network, and put its recipe in the same folder"
        )
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise MorphError(f"the weights cannot be loaded: {str(error).splitlines()[-1].strip()}") from error


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

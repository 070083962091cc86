"""Widening: more channels in any space, by copies whose outgoing weights are split, and by new channels that add zero.

W' = E_out W S_in (section 3.1): rows are copied, columns are split so that their stored parts add up to the column.
Which parameters, which rows and which columns is decided by `spaces` alone; nothing here knows an architecture.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .provenance import Mismatch
from .rebuild import Copies, ParameterMap
from .spaces import OUTPUT, Space, Spaces, find_spaces
from .splits import SPLITS, certify, split_columns
from .verify import Certificate, Example, Report, as_inputs, verified_report

Counts = Mapping[int | str, int | Sequence[int]]


@freed_pages_kept()
def widen(
    model: nn.Module,
    example: Example,
    counts: Counts | None = None,
    factor: float | None = None,
    *,
    free: Mapping[int | str, int] | None = None,
    split: str = "sterbenz",
    noise: float = 0.0,
    seed: int = 0,
    groups: str = "more",
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """A wider network that computes the same function.

    Args:
        model: any eager network; untouched unless `inplace`.
        example: its input or tuple of inputs; a small image will do unless a linear layer wants the real size.
        counts: per space (id, key, or "parameter:axis") its new width, or the number of copies of each of its classes
            in the order of `Space.order`.
        factor: for all other spaces that can grow: the new width is the nearest possible one to factor x width. Which
            channels get the additional copies is drawn by `seed`.
        free: per space a number of new random channels, whose outgoing weights are zero.
        split: of outgoing weights, "sterbenz" (random, breaks the symmetry of copies) or "kraft" (powers of two).
        noise: null-space noise on top, relative to each weight's standard deviation; then S E = I holds to rounding.
        seed: for all that is drawn.
        groups: "more" groups, or each of them "wider"; see `find_spaces`.
        inplace: put the result into `model` after all checks have passed.

    Returns:
        The wider network and the report of its checks.

    Raises:
        MorphError: a space cannot be widened thus (the message names the op and module), or a check failed; then
            nothing has been changed.
    """
    if counts is None and factor is None and free is None:
        raise MorphError("widen: give counts, a factor or free channels")
    if split not in SPLITS:
        raise MorphError(f"split '{split}' is unknown; take one of {', '.join(SPLITS)}")
    spaces = find_spaces(model, *as_inputs(example), groups=groups)
    if factor is not None and not spaces.growable():
        reasons = [f"space {s.key}: {s.frozen}" for s in spaces if s.frozen != OUTPUT] or ["all are outputs"]
        raise MorphError(f"nothing can be widened; {reasons[0]}" + (", and others" if len(reasons) > 1 else ""))
    chosen, new = _choose(spaces, counts or {}, factor, free or {}, seed)
    step = {
        "op": "widen",
        "example": [list(x.shape) for x in as_inputs(example)],
        "copies": chosen,
        "free": new,
        "split": split,
        "noise": noise,
        "seed": seed,
        "groups": groups,
    }
    child, certificate = _grow(spaces, step)
    changes = [
        f"space {s.id} ({s.key}): {s.width} -> {_width(s, chosen.get(s.key), new.get(s.key))}"
        for s in spaces
        if s.key in chosen or s.key in new
    ]
    report = verified_report(
        step, model, child, example, changes=changes, certificate=None if noise else certificate, seed=seed
    )
    return (replace_contents(model, child) if inplace else child), report


def rebuild(model: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """Repeat a widening on another instance of the network, e.g. a fresh one whose weights are to be loaded.

    Args:
        model: an instance of the same class and size as the network that was widened; untouched.
        step: `Report.step`, also after a round trip through JSON.
    """
    child, _ = _grow(spaces_of(model, step), step)
    return child


def tensor_maps(model: nn.Module, step: Mapping[str, Any]) -> dict[str, ParameterMap]:
    """Of each tensor that a widening changes, the map; `grow_tensor` applies it, one tensor at a time."""
    spaces = spaces_of(model, step)
    return check_step(spaces, step)[1]


def grow_tensor(name: str, tensor: Tensor, made: ParameterMap, step: Mapping[str, Any]) -> tuple[Tensor, Certificate]:
    """The child's tensor, and the certificate of its split; draws depend on the seed and the tensor's name only."""
    generator = torch.Generator().manual_seed((int(step["seed"]) << 32) ^ zlib.crc32(name.encode()))
    result, certificate = tensor.detach().cpu(), Certificate()
    if made.columns is not None and made.columns_axis is not None:
        before = result.movedim(made.columns_axis, 1)
        after = split_columns(before, made.columns, step["split"], generator, float(step["noise"]))
        certificate = certify(before, after, made.columns)
        result = after.movedim(1, made.columns_axis).contiguous()
    if made.parents is not None and made.free is not None and made.axis is not None:
        result = result.index_select(made.axis, made.parents)
        if bool(made.free.any()) and tensor.ndim > 1:  # vectors (norms, biases) keep those of the copied channel
            places = made.free.nonzero().reshape(-1)
            shape = [len(places) if a == made.axis else s for a, s in enumerate(result.shape)]
            deviation = float(tensor.detach().double().std(unbiased=False)) if tensor.is_floating_point() else 0.0
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation
            result.index_copy_(made.axis, places, drawn.to(result.dtype))
    return result.to(tensor.device), certificate


def replace_contents(model: nn.Module, child: nn.Module) -> nn.Module:
    """`model`, made what `child` is, the same object as before."""
    model.__dict__.clear()
    model.__dict__.update(child.__dict__)
    return model


def spaces_of(model: nn.Module, step: Mapping[str, Any]) -> Spaces:
    """Spaces of a network that the step fits, found with random inputs of the step's shapes."""
    generator = torch.Generator().manual_seed(0)
    example = [torch.randn(shape, generator=generator) for shape in step["example"]]
    return find_spaces(model, *example, groups=step["groups"])


def check_step(spaces: Spaces, step: Mapping[str, Any]) -> tuple[nn.Module, dict[str, ParameterMap]]:
    """The child without new weights and the maps of all tensors that the step changes.

    Raises:
        MorphError: the step would change the function, or names spaces that the network does not have.
    """
    copies: Copies = {}
    for key in [*step["copies"], *step["free"]]:
        space = spaces[key]
        counts = step["copies"].get(key, [1] * len(space.order))
        new = step["free"].get(key, [0] * len(space.order))
        for root, c, f in zip(space.order, counts, new, strict=True):
            copies[root] = (int(c), int(f))
    try:
        return spaces.check(copies)
    except Mismatch as error:
        raise MorphError(f"these counts would change the function: {error}; nothing was changed") from None


def _grow(spaces: Spaces, step: Mapping[str, Any]) -> tuple[nn.Module, Certificate]:
    child, maps = check_step(spaces, step)
    certificate = Certificate()

    grown: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    for kind in (spaces.model.named_parameters, spaces.model.named_buffers):
        originals |= dict(kind(remove_duplicate=False))
    for name, made in maps.items():
        grown[name], part = grow_tensor(name, originals[name], made, step)
        certificate += part

    by_id = {id(originals[name]): tensor for name, tensor in grown.items()}
    new: dict[int, Tensor] = {}
    for (path, module), parent in zip(child.named_modules(), spaces.model.modules(), strict=True):
        del path
        for key, old in vars(parent).items():
            if isinstance(old, Tensor):
                setattr(module, key, getattr(module, key).to(old.device))
        for store, source in ((module._parameters, parent._parameters), (module._buffers, parent._buffers)):
            for key, old in source.items():
                if old is None:
                    continue
                if id(old) not in new:
                    data = by_id.get(id(old))
                    data = old.detach().clone() if data is None else data
                    new[id(old)] = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
                store[key] = new[id(old)]  # pyright: ignore[reportArgumentType]
    return child, certificate


def _choose(
    spaces: Spaces, counts: Counts, factor: float | None, free: Mapping[int | str, int], seed: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Copies and new ones per class, by key."""
    if factor is not None and not factor >= 1:
        raise MorphError(f"factor {factor} would make the network narrower; give 1 or more")
    wanted: dict[str, int | Sequence[int]] = {}
    if factor is not None:
        for s in spaces.growable():
            classes = len(s.order)
            wanted[s.key] = round(classes * factor) * (s.width // classes) if _even(s) else max(1, round(factor))
    for key, value in counts.items():
        wanted[spaces[key].key] = value
    rng = np.random.default_rng(seed)
    chosen = {}
    for key, value in wanted.items():
        space = spaces[key]
        drawn = rng.integers(0, 1 << 62)
        copies = _copies(space, value, np.random.default_rng(drawn), factor is not None and key not in counts)
        if copies != [1] * len(copies):
            _must_grow(space)
            chosen[space.key] = copies
    new = {}
    for key, number in free.items():
        space = spaces[key]
        _must_grow(space)
        unit = space.width // len(space.order)
        if number % unit or number < 0 or not _even(space):
            raise MorphError(f"space {space.key} gets new channels in multiples of {unit}, not {number}")
        new[space.key] = [0] * (len(space.order) - 1) + [number // unit]
    return chosen, new


def _even(space: Space) -> bool:
    """Whether all classes have equally many channels."""
    return len({space.classes.count(c) for c in space.order}) <= 1 if len(space.order) < space.width else True


def _must_grow(space: Space) -> None:
    if space.frozen:
        raise MorphError(f"space {space.id} ({space.key}) cannot be widened: {space.frozen}")


def _copies(space: Space, value: int | Sequence[int], rng: np.random.Generator, is_factor: bool) -> list[int]:
    classes = len(space.order)
    if not isinstance(value, int | np.integer):
        copies = [int(v) for v in value]
        if len(copies) != classes or min(copies) < 1:
            raise MorphError(f"space {space.key} wants {classes} counts of at least 1, not {copies[:8]}")
        return copies
    if not _even(space):
        if is_factor:
            return [int(value)] * classes
        if value % space.width or value < space.width:
            raise MorphError(f"space {space.key} can only be widened from {space.width} to a multiple of that")
        return [int(value) // space.width] * classes
    unit = space.width // classes
    if value < space.width:
        raise MorphError(f"space {space.key} has width {space.width} already; {value} would make it narrower")
    if value % unit:
        raise MorphError(f"space {space.key} grows in steps of {unit} channels; {value} is no multiple of it")
    total = int(value) // unit
    copies = np.full(classes, total // classes)
    copies[rng.permutation(classes)[: total % classes]] += 1
    return copies.tolist()


def _width(space: Space, copies: Sequence[int] | None, free: Sequence[int] | None) -> int:
    size = dict.fromkeys(space.order, 0)
    for c in space.classes:
        size[c] += 1
    copies, free = copies or [1] * len(size), free or [0] * len(size)
    return sum(n * (c + f) for n, c, f in zip(size.values(), copies, free, strict=True))

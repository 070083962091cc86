"""Widening: more channels in any space, by copies with split outgoing weights, and by new channels that add zero.

Rows of weights are copied. Columns are split so that the stored parts add up to the column. `spaces` alone determines
the parameters, rows and columns; this module knows no architecture.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MorphError
from ..models.weights import some
from ..tiling.memory import freed_pages_kept, return_free_pages
from .attributes import follow_head, head_changes
from .copies import Copies, ParameterMap
from .copying import cast, channels_last, duplicate, fill, named_tensors
from .example import Example, Inputs, as_inputs, stand_ins
from .other_sizes import other_inputs
from .spaces import OUTPUT, Space, Spaces, find_spaces
from .splits import SPLITS, certify, split_columns
from .step import Certificate, Report, Step, check_seed
from .stock import as_given, stock
from .tracer import Mismatch
from .verify import verified_report

log = logging.getLogger("gigamorph.morph")


@torch.inference_mode(False)
@freed_pages_kept()
def widen(
    model: nn.Module,
    example: Example,
    counts: Counts | None = None,
    factor: float | Mapping[str, float] | None = None,
    *,
    free: Mapping[int | str, int] | None = None,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    split: str = "sterbenz",
    noise: float = 0.0,
    seed: int = 0,
    groups: str = "more",
    train: bool = True,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Widen a network; the wider network computes the same function.

    Args:
        model: any eager network; it is not changed unless `inplace`.
        example: its input, a tuple of positional or a dict of keyword arguments. A small image is enough unless a
            linear layer needs the real size.
        counts: per space (id, key, or "parameter:axis") the new width, or the number of copies of each class in the
            order of `Space.order`.
        factor: for all other spaces that can grow: the new width is the possible width nearest to factor x width, and
            `seed` selects the channels with additional copies. A mapping gives factors for some modules, by path or
            shell pattern ({"layer3.*": 2, "layer4.*": 1.5}); the first match counts, other spaces do not change.
        free: per space a number of new random channels with outgoing weights of zero.
        ignore: modules, by path or pattern, that no factor widens.
        round_to: widths by a factor are a multiple of this number if the space allows it; 8 suits tensor cores.
        split: split of outgoing weights, "sterbenz" (random, breaks the symmetry of copies) or "kraft" (powers of two).
        noise: additional null-space noise, relative to each weight's standard deviation; S E = I then holds up to
            rounding.
        seed: seed of all random choices.
        groups: "more" groups, or each group "wider"; see `find_spaces`.
        train: compare parent and child in train mode too; disable it if train mode runs modules that the example does
            not reach.
        inplace: put the result into `model` after all checks.

    Returns:
        The wider network and the report of its checks.

    Raises:
        MorphError: a space cannot be widened in this way (the message names the op and module), nothing would get
            wider, or a check fails; nothing is changed.
    """
    if counts is None and factor is None and free is None:
        raise MorphError("widen: give counts, a factor or free channels")
    if split not in SPLITS:
        raise MorphError(f"unknown split '{split}'; choose from {', '.join(SPLITS)}")
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise MorphError(f"noise must be 0 or positive, relative to the weights' standard deviation, not {noise!r}")
    inputs = as_inputs(example)
    given, model = model, stock(model, inplace)
    others = other_inputs(model, inputs)
    followed = inputs.and_calls(others.branching)
    spaces = find_spaces(model, followed, groups=groups)
    if factor is not None and not spaces.growable():
        reasons = [f"space {s.key}: {s.frozen}" for s in spaces if s.frozen != OUTPUT] or ["all are outputs"]
        raise MorphError(f"no space can be widened; {reasons[0]}" + (", and others" if len(reasons) > 1 else ""))
    check_seed(seed)
    chosen, new = choose_counts(spaces, counts or {}, factor, free or {}, seed, ignore=ignore, round_to=round_to)
    if not chosen and not any(map(any, new.values())):
        raise MorphError("widen: every space already has the requested width; give larger counts or a larger factor")
    step = WidenStep(followed.shapes, chosen, new, split, noise, seed, groups, followed.kinds, followed.form)
    child, maps = step.check(spaces)
    changes = [
        f"space {s.id} ({s.key}): {s.width} -> {width_after(s, chosen.get(s.key), new.get(s.key))}"
        for s in spaces
        if s.key in chosen or s.key in new
    ]
    unread = some(f"'{path}'" for path in spaces.unread()) if chosen or new else ""
    del spaces  # its labels may need as much memory as the network
    return_free_pages()
    certificate = step.fill(child, model, maps)
    changes += head_changes(model, child)
    if name := standard_name(child):
        changes.append(f"{name} builds the same network: its weights load there without a recipe")
    if unread:
        changes.append(f"this example does not reach these modules, which keep their width: {unread}")
    parent, checked, proof = model, child, certificate
    if noise:  # the stored sums are rounded, so the comparison uses float64, where this rounding hides nothing
        parent, proof = cast(duplicate(model), torch.float64), None
        checked, _ = step.grow(find_spaces(parent, followed, groups=groups))
    checks: dict[str, Any] = {"changes": changes, "certificate": proof, "seed": seed, "compare_train": train}
    try:
        report = verified_report(step, parent, checked, inputs, others=others, **checks)
    except MorphError as error:
        if not unread:
            raise
        raise MorphError(
            f"{error}; this example does not reach {unread}, which would keep their width; use train=False to compare "
            "eval mode only"
        ) from error
    return (replace_contents(model, child) if inplace else as_given(child, given)), report


@dataclass(frozen=True)
class WidenStep(Step, op="widen"):
    """Step of `widen`.

    Attributes:
        example: shapes of the inputs of `find_spaces`.
        copies: copies of each class of each space that grows, by its key.
        free: new channels of each class of each space that grows, by its key.
        groups: the argument of `find_spaces`.
        kinds: dtypes of the inputs, if not all are floating.
        form: positions of the inputs among the arguments, if they are not the positional ones; see `Inputs`.
    """

    example: tuple[tuple[int, ...], ...]
    copies: dict[str, tuple[int, ...]]
    free: dict[str, tuple[int, ...]]
    split: str
    noise: float
    seed: int
    groups: str
    kinds: tuple[str, ...] = ()
    form: Any = None

    def repeat(self, model: nn.Module) -> nn.Module:
        return self.grow(self.spaces_of(model))[0]

    def tensor_maps(self, model: nn.Module) -> dict[str, ParameterMap]:
        """Return the map of each tensor that the widening changes; `grow_tensor` applies it to one tensor."""
        return self.check(self.spaces_of(model))[1]

    def spaces_of(self, model: nn.Module) -> Spaces:
        """Find the spaces of a network that fits the step, with random inputs of the step's shapes."""
        return find_spaces(model, self.inputs(), groups=self.groups)

    def inputs(self) -> Inputs:
        """Create inputs of the recorded shapes on the CPU."""
        return stand_ins(self.example, self.kinds, self.form)

    def check(self, spaces: Spaces) -> tuple[nn.Module, dict[str, ParameterMap]]:
        """Return the child without new weights, and the maps of all tensors that the step changes.

        Raises:
            MorphError: the step would change the function, or names spaces that the network does not have.
        """
        return check_counts(spaces, self.copies, self.free)

    def grow(self, spaces: Spaces) -> tuple[nn.Module, Certificate]:
        """Return the child with its weights, and the certificate of all splits."""
        child, maps = self.check(spaces)
        return child, self.fill(child, spaces.model, maps)

    def fill(self, child: nn.Module, parent: nn.Module, maps: Mapping[str, ParameterMap]) -> Certificate:
        """Set the weights of the child that `check` built; return the certificate of all splits."""
        log.info("splitting weights")
        originals, certificate = named_tensors(parent), Certificate()
        grown: dict[int, Tensor] = {}
        for name, made in maps.items():
            grown[id(originals[name])], part = self.grow_tensor(name, originals[name], made)
            certificate += part
        for module, source in zip(child.modules(), parent.modules(), strict=True):
            for key, old in vars(source).items():
                if isinstance(old, Tensor):
                    setattr(module, key, getattr(module, key).to(old.device))
        fill(child, parent, lambda t: grown[id(t)] if id(t) in grown else t.detach().clone())
        follow_head(parent, child)
        return certificate

    def grow_tensor(self, name: str, tensor: Tensor, made: ParameterMap) -> tuple[Tensor, Certificate]:
        """Return the child's tensor and the certificate of its split; only seed and name determine random numbers."""
        generator = torch.Generator().manual_seed((int(self.seed) << 32) ^ zlib.crc32(name.encode()))
        result, certificate = tensor.detach().cpu(), Certificate()
        if made.columns is not None and made.columns_axis is not None:
            before = result.movedim(made.columns_axis, 1)
            after = split_columns(before, made.columns, self.split, generator, float(self.noise))
            certificate = certify(before, after, made.columns)
            result = after.movedim(1, made.columns_axis).contiguous()
        if made.parents is not None and made.free is not None and made.axis is not None:
            result = result.index_select(made.axis, made.parents)
            if bool(made.free.any()) and tensor.ndim > 1:  # vectors (norms, biases) use those of the copied channel
                _draw(result, made.axis, made.free, tensor, generator)
        result = result.contiguous(memory_format=channels_last(tensor) or torch.contiguous_format)
        return result.to(tensor.device), certificate


def check_counts(
    spaces: Spaces, copies: Mapping[str, Sequence[int]], free: Mapping[str, Sequence[int]]
) -> tuple[nn.Module, dict[str, ParameterMap]]:
    """Run `Spaces.check` for copies and new channels per class, by the keys of the spaces.

    Raises:
        MorphError: they would change the function, or a space does not exist.
    """
    counts: Copies = {}
    for key in [*copies, *free]:
        order = spaces[key].order
        pairs = zip(copies.get(key, [1] * len(order)), free.get(key, [0] * len(order)), strict=True)
        counts |= {root: (int(c), int(f)) for root, (c, f) in zip(order, pairs, strict=True)}
    try:
        return spaces.check(counts)
    except Mismatch as error:
        raise MorphError(
            f"these counts would change the function: {error}; choose others, nothing was changed"
        ) from None


def replace_contents(model: nn.Module, child: nn.Module) -> nn.Module:
    """Replace the contents of `model` by those of `child`, and return `model`."""
    model.__dict__.clear()
    model.__dict__.update(child.__dict__)
    return model


def _draw(result: Tensor, axis: int, free: Tensor, like: Tensor, generator: torch.Generator) -> None:
    """Fill the new slices with random values of the same standard deviation as the parent's tensor."""
    indices = free.nonzero().reshape(-1)
    shape = [len(indices) if a == axis else s for a, s in enumerate(result.shape)]
    deviation = float(like.detach().double().std(unbiased=False)) if like.is_floating_point() else 0.0
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation
    result.index_copy_(axis, indices, drawn.to(result.dtype))


MOST = 40  # maximum number of functions to try; each builds a network without memory


def standard_name(network: nn.Module) -> str:
    """Return the name of the function that builds the same network; "" if there is none.

    It searches the module that defines the network's class, and calls functions with `num_classes` only. Networks are
    the same if names and shapes of all parameters and the printed layers are equal.
    """
    module = sys.modules.get(type(network).__module__)
    shapes = {name: t.shape for name, t in network.state_dict().items()}
    outputs = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) >= 2][-1:]
    for name, build in _builders(module):
        try:
            with torch.device("meta"), _Unfilled():
                made = build(num_classes=outputs[0]) if outputs else build()
        except Exception:  # it needs other arguments, or cannot build without memory
            continue
        if type(made) is not type(network) or {n: t.shape for n, t in made.state_dict().items()} != shapes:
            continue
        if str(made) == str(network):
            return f"{type(network).__module__}.{name}"
    return ""


class _Unfilled(TorchFunctionMode):
    """Function mode that skips filling tensors, which is most of the construction time of a network without memory."""

    FILLS = frozenset("uniform_ normal_ fill_ zero_ copy_ erfinv_ mul_ add_ sub_ div_ clamp_".split())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.FILLS and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def _builders(module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    found = [
        (name, f)
        for name, f in vars(module).items()
        if inspect.isfunction(f) and not name.startswith("_") and f.__module__ == module.__name__
    ]
    yield from found if len(found) <= MOST else []


Counts = Mapping[int | str, int | Sequence[int]]


def choose_counts(
    spaces: Spaces,
    counts: Counts,
    factor: float | Mapping[str, float] | None,
    free: Mapping[int | str, int],
    seed: int,
    *,
    ignore: Sequence[str] = (),
    round_to: int = 1,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return copies and new channels per class, by key of the space; the arguments are those of `widen`."""
    if not isinstance(round_to, int) or round_to < 1:
        raise MorphError(f"round_to must be a number of channels of at least 1, not {round_to!r}")
    wanted: dict[str, int | Sequence[int]] = {}
    for s, by in _factors(spaces, factor, ignore):
        unit = s.width // len(s.order)
        wanted[s.key] = _rounded(s.width * by, unit, s.width, round_to) if _even(s) else max(1, round(by))
    for key, value in counts.items():
        wanted[spaces[key].key] = value
    rng = np.random.default_rng(seed)
    chosen = {}
    for key, value in wanted.items():
        space = spaces[key]
        drawn = rng.integers(0, 1 << 62)
        copies = _copies(space, value, np.random.default_rng(drawn), factor is not None and key not in counts)
        if copies != [1] * len(copies):
            _require_not_frozen(space)
            chosen[space.key] = tuple(copies)
    new = {}
    for key, number in free.items():
        space = spaces[key]
        _require_not_frozen(space)
        unit = space.width // len(space.order)
        if number % unit or number < 0 or not _even(space):
            raise MorphError(f"new channels of space {space.key} must be a multiple of {unit}, not {number}")
        new[space.key] = (*[0] * (len(space.order) - 1), number // unit)
    return chosen, new


def _factors(
    spaces: Spaces, factor: float | Mapping[str, float] | None, ignore: Sequence[str]
) -> list[tuple[Space, float]]:
    """Return the spaces that a factor widens, each with its factor.

    Raises:
        MorphError: a factor is not a finite number of at least 1, or a pattern matches no space that can grow.
    """
    if factor is None:
        return []
    by = dict(factor) if isinstance(factor, Mapping) else {"*": factor}
    for value in by.values():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MorphError(f"factor {value!r} is not a finite number; give 1 or more")
        if not value >= 1:
            raise MorphError(f"factor {value} would make the network narrower; give 1 or more")
    growable = spaces.growable()
    for pattern in [*ignore, *(by if isinstance(factor, Mapping) else [])]:
        if not any(_fits(pattern, s) for s in growable):
            raise MorphError(
                f"'{pattern}' matches no module with channels that can grow; see find_spaces, or gigamorph morph spaces"
            )
    not_ignored = [s for s in growable if not any(_fits(pattern, s) for pattern in ignore)]
    pairs = [(s, next((v for pattern, v in by.items() if _fits(pattern, s)), None)) for s in not_ignored]
    return [(s, value) for s, value in pairs if value is not None]


def _fits(pattern: str, space: Space) -> bool:
    """Return whether a pattern is the space's key, or matches a module that produces its channels, or a parent."""
    if pattern in ("*", space.key):
        return True
    paths = [name.rpartition(".")[0] for name, axis in space.members if axis == 0]
    parents = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 2)}
    return any(fnmatchcase(path, pattern) for path in parents)


def _rounded(width: float, unit: int, least: int, round_to: int) -> int:
    """Return the nearest common multiple of the unit and `round_to` that is at least `least`."""
    step = math.lcm(unit, round_to)
    near = round(width / step) * step
    return max(near if near >= least else math.ceil(least / step) * step, least)


def _even(space: Space) -> bool:
    """Return whether all classes have the same number of channels."""
    return len({space.classes.count(c) for c in space.order}) <= 1 if len(space.order) < space.width else True


def _require_not_frozen(space: Space) -> None:
    if space.frozen:
        raise MorphError(f"space {space.id} ({space.key}) cannot be widened: {space.frozen}")


def _copies(space: Space, value: int | Sequence[int], rng: np.random.Generator, is_factor: bool) -> list[int]:
    classes = len(space.order)
    if not isinstance(value, int | np.integer):
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise MorphError(f"space {space.key}: {value!r} is not a width; give an integer, or one integer per class")
        copies = [int(v) for v in value]
        if len(copies) != classes or min(copies) < 1:
            raise MorphError(f"space {space.key} needs {classes} counts of at least 1, not {copies[:8]}")
        return copies
    if not _even(space):
        if is_factor:
            return [int(value)] * classes
        if value % space.width or value < space.width:
            raise MorphError(f"space {space.key} has width {space.width}; it can only be widened to a multiple of that")
        return [int(value) // space.width] * classes
    unit = space.width // classes
    if value < space.width:
        raise MorphError(f"space {space.key} already has width {space.width}; {value} would make it narrower")
    if value % unit:
        raise MorphError(f"space {space.key} grows in steps of {unit} channels; {value} is not a multiple of that")
    total = int(value) // unit
    copies = np.full(classes, total // classes)
    copies[rng.permutation(classes)[: total % classes]] += 1
    return copies.tolist()


def width_after(space: Space, copies: Sequence[int] | None, free: Sequence[int] | None) -> int:
    """Return the width of a space with these numbers of copies and new channels per class."""
    size = dict.fromkeys(space.order, 0)
    for c in space.classes:
        size[c] += 1
    copies, free = copies or [1] * len(size), free or [0] * len(size)
    return sum(n * (c + f) for n, c, f in zip(size.values(), copies, free, strict=True))

"""Widening: more channels in any space, by copies whose outgoing weights are split, and by new channels that add zero.

Rows of weights are copied, columns are split so that their stored parts add up to the column. Which parameters, which
rows and which columns is decided by `spaces` alone; nothing here knows an architecture.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept, return_free_pages
from .attributes import follow_head, head_changes
from .copies import Copies, ParameterMap
from .copying import cast, duplicate
from .example import Example, Inputs, as_inputs, stand_ins
from .other_sizes import Others, other_inputs
from .report import Certificate, Report
from .spaces import OUTPUT, Spaces, find_spaces
from .splits import SPLITS, certify, split_columns
from .standard import standard_name
from .step import Step, check_seed
from .stock import as_given, stock
from .tensors import channels_last, fill, named_tensors
from .tracer import Mismatch
from .verify import verified_report
from .widths import Counts, choose_counts, width_after

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
    """A wider network that computes the same function.

    Args:
        model: any eager network; untouched unless `inplace`.
        example: its input, a tuple of positional or a dict of keyword arguments; a small image will do unless a linear
            layer wants the real size.
        counts: per space (id, key, or "parameter:axis") its new width, or the number of copies of each of its classes
            in the order of `Space.order`.
        factor: for all other spaces that can grow: the new width is the nearest possible one to factor x width. Which
            channels get the additional copies is drawn by `seed`. Or one for each module of some, by path or by a
            pattern as in a shell ({"layer3.*": 2, "layer4.*": 1.5}), the first that fits; other spaces stay.
        free: per space a number of new random channels, whose outgoing weights are zero.
        ignore: modules, by path or pattern, whose channels no factor widens.
        round_to: what the widths by a factor are a multiple of where a space allows it, 8 for tensor cores.
        split: of outgoing weights, "sterbenz" (random, breaks the symmetry of copies) or "kraft" (powers of two).
        noise: null-space noise on top, relative to each weight's standard deviation; then S E = I holds to rounding.
        seed: for all that is drawn.
        groups: "more" groups, or each of them "wider"; see `find_spaces`.
        train: compare parent and child in train mode too; omit it for a network whose train mode runs what the
            example does not reach.
        inplace: put the result into `model` after all checks have passed.

    Returns:
        The wider network and the report of its checks.

    Raises:
        MorphError: a space cannot be widened thus (the message names the op and module), nothing would get wider, or a
            check failed; then nothing has been changed.
    """
    if counts is None and factor is None and free is None:
        raise MorphError("widen: give counts, a factor or free channels")
    if split not in SPLITS:
        raise MorphError(f"split '{split}' is unknown; take one of {', '.join(SPLITS)}")
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise MorphError(f"noise {noise!r}: give 0 or a positive number, relative to the weights' standard deviation")
    inputs = as_inputs(example)
    given, model = model, stock(model, inplace)
    others = other_inputs(model, inputs)
    followed = inputs.and_calls(others.ways)
    spaces = find_spaces(model, followed, groups=groups)
    if factor is not None:
        _require_growable(spaces)
    check_seed(seed)
    chosen, new = choose_counts(spaces, counts or {}, factor, free or {}, seed, ignore=ignore, round_to=round_to)
    if not chosen and not any(map(any, new.values())):
        raise MorphError("widen: every space has the width that was asked for; nothing would change")
    step = WidenStep(followed.shapes, chosen, new, split, noise, seed, groups, followed.kinds, followed.form)
    child, maps = step.check(spaces)
    changes = [
        f"space {s.id} ({s.key}): {s.width} -> {width_after(s, chosen.get(s.key), new.get(s.key))}"
        for s in spaces
        if s.key in chosen or s.key in new
    ]
    unread = _listed(spaces.unread()) if chosen or new else ""
    del spaces  # whose labels may take as much memory as the network
    return_free_pages()
    certificate = step.fill(child, model, maps)
    changes += head_changes(model, child)
    if name := standard_name(child):
        changes.append(f"this is what {name} builds: load the weights there, without a recipe")
    if unread:
        changes.append(f"not reached by this example, and as wide as they were: {unread}")
    report = _verified(step, model, child, inputs, others, changes, certificate, train, unread)
    return (replace_contents(model, child) if inplace else as_given(child, given)), report


def _require_growable(spaces: Spaces) -> None:
    """Refuse a factor where no space can grow."""
    if not spaces.growable():
        reasons = [f"space {s.key}: {s.frozen}" for s in spaces if s.frozen != OUTPUT] or ["all are outputs"]
        raise MorphError(f"nothing can be widened; {reasons[0]}" + (", and others" if len(reasons) > 1 else ""))


def _verified(
    step: WidenStep,
    model: nn.Module,
    child: nn.Module,
    inputs: Inputs,
    others: Others,
    changes: list[str],
    certificate: Certificate,
    train: bool,
    unread: str,
) -> Report:
    """The report that the child computes what the network does.

    With noise its sums are rounded when they are stored: the function is compared in float64, where that hides nothing.

    Args:
        unread: the modules that the example does not reach, for the message of a failed check.
    """
    proof: Certificate | None = certificate
    if step.noise:
        model, proof = cast(duplicate(model), torch.float64), None
        child, _ = step.grow(find_spaces(model, inputs.and_calls(others.ways), groups=step.groups))
    try:
        return verified_report(
            step,
            model,
            child,
            inputs,
            changes=changes,
            certificate=proof,
            seed=step.seed,
            compare_train=train,
            others=others,
        )
    except MorphError as error:
        if not unread:
            raise
        raise MorphError(
            f"{error}; this example does not reach {unread}, which would keep their width; train=False compares eval "
            "mode alone"
        ) from error


@dataclass(frozen=True)
class WidenStep(Step, op="widen"):
    """See `widen`; of each space that grows, by its key, the copies and the new channels of each of its classes.

    Attributes:
        example: shapes of the inputs with which the spaces were found; `groups` says how.
        kinds: their dtypes, if not all are floating.
        form: their places among the arguments, if they are not the positional ones; see `Inputs`.
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
        """Of each tensor that the widening changes, the map; `grow_tensor` applies it, one tensor at a time."""
        return self.check(self.spaces_of(model))[1]

    def spaces_of(self, model: nn.Module) -> Spaces:
        """Spaces of a network that the step fits, found with random inputs of the step's shapes."""
        return find_spaces(model, self.inputs(), groups=self.groups)

    def inputs(self) -> Inputs:
        """Inputs of the recorded shapes, on the CPU."""
        return stand_ins(self.example, self.kinds, self.form)

    def check(self, spaces: Spaces) -> tuple[nn.Module, dict[str, ParameterMap]]:
        """The child without new weights and the maps of all tensors that the step changes.

        Raises:
            MorphError: the step would change the function, or names spaces that the network does not have.
        """
        return check_counts(spaces, self.copies, self.free)

    def grow(self, spaces: Spaces) -> tuple[nn.Module, Certificate]:
        """The child with its weights, and the certificate of all splits."""
        child, maps = self.check(spaces)
        return child, self.fill(child, spaces.model, maps)

    def fill(self, child: nn.Module, parent: nn.Module, maps: Mapping[str, ParameterMap]) -> Certificate:
        """Give the child that `check` made its weights; the certificate of all splits."""
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
        """The child's tensor, and the certificate of its split; draws depend on the seed and the tensor's name only."""
        generator = torch.Generator().manual_seed((int(self.seed) << 32) ^ zlib.crc32(name.encode()))
        result, certificate = tensor.detach().cpu(), Certificate()
        if made.columns is not None and made.columns_axis is not None:
            before = result.movedim(made.columns_axis, 1)
            after = split_columns(before, made.columns, self.split, generator, float(self.noise))
            certificate = certify(before, after, made.columns)
            result = after.movedim(1, made.columns_axis).contiguous()
        if made.parents is not None and made.free is not None and made.axis is not None:
            result = result.index_select(made.axis, made.parents)
            if bool(made.free.any()) and tensor.ndim > 1:  # vectors (norms, biases) keep those of the copied channel
                _draw(result, made.axis, made.free, tensor, generator)
        result = result.contiguous(memory_format=channels_last(tensor) or torch.contiguous_format)
        return result.to(tensor.device), certificate


def check_counts(
    spaces: Spaces, copies: Mapping[str, Sequence[int]], free: Mapping[str, Sequence[int]]
) -> tuple[nn.Module, dict[str, ParameterMap]]:
    """`Spaces.check` for copies and new channels per class, by the spaces' keys.

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
        raise MorphError(f"these counts would change the function: {error}; nothing was changed") from None


def replace_contents(model: nn.Module, child: nn.Module) -> nn.Module:
    """`model`, made what `child` is, the same object as before."""
    model.__dict__.clear()
    model.__dict__.update(child.__dict__)
    return model


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def _draw(result: Tensor, axis: int, free: Tensor, like: Tensor, generator: torch.Generator) -> None:
    """Random values in the slices that are new, as widely spread as those of the parent's tensor."""
    places = free.nonzero().reshape(-1)
    shape = [len(places) if a == axis else s for a, s in enumerate(result.shape)]
    deviation = float(like.detach().double().std(unbiased=False)) if like.is_floating_point() else 0.0
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation
    result.index_copy_(axis, places, drawn.to(result.dtype))

"""Widening: more channels in any space, by copies with split outgoing weights, and by new channels that add zero.

Rows of weights are copied. Columns are split so that the stored parts add up to the column. `spaces` alone determines
the parameters, rows and columns; this module knows no architecture.
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
    if factor is not None:
        _require_growable(spaces)
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
    unread = _listed(spaces.unread()) if chosen or new else ""
    del spaces  # its labels may need as much memory as the network
    return_free_pages()
    certificate = step.fill(child, model, maps)
    changes += head_changes(model, child)
    if name := standard_name(child):
        changes.append(f"{name} builds the same network: its weights load there without a recipe")
    if unread:
        changes.append(f"this example does not reach these modules, which keep their width: {unread}")
    report = _verified(step, model, child, inputs, others, changes, certificate, train, unread)
    return (replace_contents(model, child) if inplace else as_given(child, given)), report


def _require_growable(spaces: Spaces) -> None:
    """Refuse a factor if no space can grow."""
    if not spaces.growable():
        reasons = [f"space {s.key}: {s.frozen}" for s in spaces if s.frozen != OUTPUT] or ["all are outputs"]
        raise MorphError(f"no space can be widened; {reasons[0]}" + (", and others" if len(reasons) > 1 else ""))


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
    """Check that the child computes the same function as the network, and return the report.

    With noise the stored sums are rounded. The comparison then uses float64, where this rounding hides nothing.

    Args:
        step: the step of the widening.
        model: the parent.
        child: the child.
        inputs: the example.
        others: further inputs of the check.
        changes: lines of the report.
        certificate: certificate of the splits.
        train: whether to compare train mode.
        unread: the modules that the example does not reach, for the message of a failed check.
    """
    proof: Certificate | None = certificate
    if step.noise:
        model, proof = cast(duplicate(model), torch.float64), None
        child, _ = step.grow(find_spaces(model, inputs.and_calls(others.branching), groups=step.groups))
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
            f"{error}; this example does not reach {unread}, which would keep their width; use train=False to compare "
            "eval mode only"
        ) from error


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


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def _draw(result: Tensor, axis: int, free: Tensor, like: Tensor, generator: torch.Generator) -> None:
    """Fill the new slices with random values of the same standard deviation as the parent's tensor."""
    indices = free.nonzero().reshape(-1)
    shape = [len(indices) if a == axis else s for a, s in enumerate(result.shape)]
    deviation = float(like.detach().double().std(unbiased=False)) if like.is_floating_point() else 0.0
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation
    result.index_copy_(axis, indices, drawn.to(result.dtype))

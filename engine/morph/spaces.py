"""Channel spaces: channels of a network that can be widened, alone or together, and the reasons for frozen ones.

This module knows no architecture. It follows one forward of the unmodified network value by value (`ParentRun`). Then
it widens every space by uneven counts, without weights, and checks the whole program (`ChildCheck`). If the check
fails, the input channels of the failing op are frozen with the op's name and module, and the trial is repeated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..errors import MorphError
from .child_check import run_child
from .copies import Copies, CopyPlan, ParameterMap, make_plan
from .copying import change_attributes, duplicate, fill, named_tensors, of_kind, resized
from .example import Inputs, as_inputs
from .labels import Label, no_atoms
from .lookup import PositionTable
from .parent_run import Axis, ParentRun
from .running import first_line, output_leaves
from .stock import stock
from .tracer import Mismatch

log = logging.getLogger("gigamorph.morph")

TRIALS = 60
GROUPS = ("more", "wider")
OUTPUT = "an output of the network"  # reason of a frozen space


@dataclass(frozen=True)
class Space:
    """Channels that occur on the same parameter axes.

    A class is a set of channels that need equal counts: a group of a grouped convolution, all channels under a
    LayerNorm, or a single channel.

    Attributes:
        id: number, in the order of the forward.
        members: pairs of parameter or buffer name and axis; the same channels may occur on several axes.
        classes: the class of each channel; channels of one class must be copied equally often.
        frozen: why the space cannot be widened, with the module; empty if it can.
        key: a stable name: the first member, plus the index of the first channel if several spaces share that member.
    """

    id: int
    members: tuple[Axis, ...]
    classes: tuple[int, ...]
    frozen: str
    key: str

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.classes)

    @property
    def order(self) -> list[int]:
        """Its distinct classes in the order of the channels."""
        return list(dict.fromkeys(self.classes))

    def __str__(self) -> str:
        """Return the first members, and the reason if it cannot grow."""
        more = f" and {len(self.members) - 2} more" if len(self.members) > 2 else ""
        text = ", ".join(f"{name}:{axis}" for name, axis in self.members[:2]) + more
        return f"{text}  [{self.frozen}]" if self.frozen else text


@dataclass(eq=False)
class Spaces:
    """All spaces of a network, and the data of the parent's run that widening needs."""

    spaces: list[Space]
    found: ParentRun = field(repr=False)
    outputs: list[Any] = field(repr=False)
    inputs: Inputs = field(repr=False)
    model: nn.Module = field(repr=False)
    followed: nn.Module = field(repr=False)  # `model`, or a copy of it on the CPU

    def __iter__(self) -> Any:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, key: int | str) -> Space:
        """Find a space by id, by key, or by parameter name and axis (`conv1.weight:0`)."""
        for space in self.spaces:
            if key in (space.id, space.key):
                return space
        members = [s for s in self.spaces if any(key == f"{name}:{axis}" for name, axis in s.members)]
        if len(members) == 1:
            return members[0]
        raise MorphError(f"no channel space '{key}'; see the table of find_spaces, or gigamorph morph spaces")

    def growable(self) -> list[Space]:
        """Return the spaces that can be widened."""
        return [s for s in self.spaces if not s.frozen]

    def unread(self) -> list[str]:
        """Return the paths of modules with parameters that the forward of this example did not read."""
        read = self.found.parameters.keys() | self.found.linear_names
        own = {n.rpartition(".")[0]: True for n, p in self.followed.named_parameters() if p.is_floating_point()}
        used = {name.rpartition(".")[0] for name in read}
        return [path for path in own if path not in used]

    def check(self, copies: Copies) -> tuple[nn.Module, dict[str, ParameterMap]]:
        """Return the child with the new sizes but without new weights, and the maps of all tensors that change.

        Raises:
            Mismatch: an op of the child would not compute copies of the parent's values.
        """
        log.info("checking the widened network op by op")
        plan = make_plan(self.found, copies)
        child = skeleton(self.followed, plan, self.found)
        return child, run_child(child, self.found, plan, self.inputs, self.outputs)

    def __str__(self) -> str:
        lines = [f"{'id':>3}  {'width':>6}  {'unit':>5}  members and, if frozen, why"]
        for s in self.spaces:
            lines.append(f"{s.id:>3}  {s.width:>6}  {s.width // max(len(s.order), 1):>5}  {s}")
        return "\n".join(lines)


@torch.inference_mode(False)  # inference tensors have no version counters, which detect writes
def find_spaces(model: nn.Module, *example: Any, groups: str = "more") -> Spaces:
    """Find all channel spaces of a network.

    Two concatenated maps are frozen if one group of a grouped convolution, with more than one channel, reads parts of
    both. They could grow by other means, but copies of the whole group would need channels of both maps at once.

    Args:
        model: any eager network; it runs in eval mode on the CPU (as a copy if it is on another device), unchanged.
        example: its inputs, or one example of any kind that `as_inputs` accepts. One small image is enough unless a
            linear layer needs the real size.
        groups: growth of convolutions with several input channels per group. "more": whole groups are copied (ResNeXt
            32x4d to 64x4d), and a class is a group. "wider": channels are copied within their group (to 32x8d), and a
            class is the same index in all groups; transposed convolutions still get more groups.

    Raises:
        MorphError: the forward cannot be followed (TorchScript, custom autograd functions, in-place writes to views).
    """
    if groups not in GROUPS:
        raise MorphError(f"unknown groups '{groups}'; choose from {', '.join(GROUPS)}")
    model = stock(model)
    given = as_inputs(example[0] if len(example) == 1 else example)
    found, result, inputs, followed = labelled_run(model, given, groups=groups)
    outputs: list[Any] = []
    for leaf in output_leaves(result):
        if isinstance(leaf, Tensor):
            label = found.need(leaf)
            assert label.atoms is not None
            found.atoms.freeze(label.atoms, OUTPUT)
            outputs.append(label.vids)
        else:
            outputs.append(leaf)
    spaces = Spaces([], found, outputs, inputs, model, followed)
    _try(spaces)
    spaces.spaces = _group(found)
    return spaces


def labelled_run(model: nn.Module, example: Inputs, groups: str = "more") -> tuple[ParentRun, Any, Inputs, nn.Module]:
    """Run a network with labels, in eval mode on the CPU; return the run, its result, its inputs and the network.

    Raises:
        MorphError: the forward cannot be followed.
    """
    _require_eager(model)
    followed = change_attributes(duplicate(model).cpu(), Tensor.cpu) if _is_off_cpu(model) else model
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    first = example.first()
    inputs = replace(first, tensors=tuple(x.cpu() for x in first.to(dtype)))
    found = ParentRun(followed, PositionTable(), groups)
    given = replace(inputs, tensors=inputs.to(dtype))
    for x in given.tensors:
        found.input_vids.append(found.number(no_atoms(x.shape)))
        found.set_label(x, Label(found.input_vids[-1], no_atoms(x.shape)))
    log.info("following the channels through one forward")
    try:
        result = found.forward(given)
    except MorphError:
        raise
    except Exception as error:
        text = f"{first_line(error)} (after {found.where_now})"
        shapes = ", ".join(" x ".join(map(str, x.shape)) for x in given.tensors)
        raise MorphError(
            f"the network cannot be run on an example of {shapes}: {text}; give an example of a valid size "
            "(gigamorph morph --size HxW)"
        ) from error
    return found, result, inputs, followed


def _require_eager(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise MorphError(f"module '{name}' is TorchScript; give the plain eager module")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise MorphError(f"module '{name}' is lazy; run the model once before you morph it")
        if hasattr(module, "_orig_mod"):
            raise MorphError("the model is compiled; give the network itself, model._orig_mod, and compile the child")
        if "quantized" in type(module).__module__:
            raise MorphError(f"module '{name}' is quantised; morph the network before you quantise it")


def _is_off_cpu(model: nn.Module) -> bool:
    return any(t.device.type not in ("cpu", "meta") for t in [*model.parameters(), *model.buffers()])


def _classes(found: ParentRun) -> list[int]:
    """Return the classes that are not frozen."""
    if not found.axes:
        return []
    roots = np.unique(np.concatenate([found.atoms.roots(a) for a in found.axes.values()]))
    return [int(r) for r in roots if not found.atoms.frozen(int(r))]


def _try(spaces: Spaces) -> None:
    """Freeze channels that do not pass the check at uneven counts."""
    found = spaces.found
    atom_of = found.atom_of()
    for _ in range(TRIALS):
        classes = _classes(found)
        if not classes:
            return
        counts = np.random.default_rng(0).integers(2, 4, len(classes))  # a count of 1 would not test a class
        try:
            spaces.check({c: (int(k), 0) for c, k in zip(classes, counts, strict=True)})
            return
        except Mismatch as error:
            vids = torch.cat([v.reshape(-1) for v in error.vids]) if error.vids else torch.zeros(0, dtype=torch.int64)
            blamed = np.unique(found.atoms.roots(atom_of[torch.unique(vids[vids >= 0])]))
            blamed = [int(r) for r in blamed if not found.atoms.frozen(int(r))]
            if not blamed:  # the op read no channel that can grow, so find the spaces that break it
                blamed = [c for s in _group(found) if not s.frozen and not _can_widen(spaces, s) for c in s.order]
            found.atoms.freeze(np.array(blamed or classes), str(error))
    found.atoms.freeze(np.array(_classes(found) or [0]), f"no widening passed in {TRIALS} trials")


def _can_widen(spaces: Spaces, space: Space) -> bool:
    """Return whether one space can be widened without the others."""
    try:
        spaces.check(dict.fromkeys(space.order, (2, 0)))
    except Mismatch:
        return False
    return True


def _group(found: ParentRun) -> list[Space]:
    """Group classes into spaces: classes on the same axes that are frozen for the same reason, or not frozen."""
    roots = {axis: found.atoms.roots(atoms) for axis, atoms in found.axes.items()}
    texts: dict[str, int] = {}
    kind = np.array([texts.setdefault(text, len(texts)) for text in found.atoms.reasons])[found.atoms.reason]
    count = len(texts)
    for here in map(np.unique, roots.values()):
        before, which = np.unique(kind[here], return_inverse=True)
        kind[here] = count + which
        count += len(before)
    parts: dict[int, dict[Axis, np.ndarray]] = {}
    for axis, classes in roots.items():
        kinds = kind[classes]
        for k in dict.fromkeys(kinds.tolist()):
            parts.setdefault(k, {})[axis] = classes[kinds == k]
    spaces: list[Space] = []
    keys: set[str] = set()
    for k, axes in parts.items():
        narrowest = min(axes.values(), key=len)
        members = tuple(sorted(axes, key=lambda m: m[0] not in found.linear_names))
        name, axis = members[0]
        key = f"{name}:{axis}"
        if key in keys:
            key += f"@{np.flatnonzero(kind[roots[name, axis]] == k)[0]}"
        keys.add(key)
        frozen = found.atoms.frozen(int(narrowest[0]))
        spaces.append(Space(len(spaces), members, tuple(narrowest.tolist()), frozen, key))
    return spaces


def skeleton(model: nn.Module, plan: CopyPlan, found: ParentRun) -> nn.Module:
    """Copy the model; the copy shares its tensors, except those that the plan resizes.

    Resized weights of linear ops have no values, because the check does not read them.
    """
    tensors = named_tensors(model)
    made: dict[int, Tensor] = {}
    vectors: set[int] = set()
    for (name, axis), parents in plan.parents.items():
        old = tensors[name]
        if name in found.parameters:
            made[id(old)] = of_kind(old, old.detach().index_select(axis, parents.to(old.device)))
            vectors.add(id(old))
        else:
            made[id(old)] = _sized(made.get(id(old), old), axis, len(parents))
    for (name, axis), atoms in found.columns.items():
        length = int(plan.counts[:, found.atoms.roots(atoms)].sum())
        if length != len(atoms):
            made[id(tensors[name])] = _sized(made.get(id(tensors[name]), tensors[name]), axis, length)
    child = duplicate(model, {id(t): t for t in tensors.values()})
    fill(child, model, lambda t: made.get(id(t), t))
    for module, source in zip(child.modules(), model.modules(), strict=True):
        own = {**source._parameters, **source._buffers}
        for key, (before, after) in resized(module, source).items():
            if id(own[key]) in vectors:
                resize_attributes(module, before, after)
    return child


def _sized(tensor: Tensor, axis: int, length: int) -> Tensor:
    """Return a tensor of another length along an axis, without own memory."""
    shape = [length if a == axis else s for a, s in enumerate(tensor.shape)]
    return of_kind(tensor, tensor.detach().new_zeros(()).expand(shape))


def resize_attributes(module: nn.Module, before: Sequence[int], after: Sequence[int]) -> None:
    """Update attributes that repeat the length of a module's vector, or the width of an embedding's table."""
    if isinstance(module, nn.Embedding):
        module.embedding_dim = after[1]
    if sum(side > 1 for side in before) > 1:
        return
    old, new = math.prod(before), math.prod(after)
    for key in ("num_features", "num_channels", "num_parameters", "out_channels", "out_features"):
        if getattr(module, key, None) == old:
            setattr(module, key, new)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        module.__dict__["normalized_shape"] = (new,)

"""Stem, receptive field and activation memory of a network, from its recorded program.

The stem is the set of convolutions that read the image, directly or after steps that commute with averaging over
pixels (subtracting a mean, dividing by a deviation, repeating a channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call_trees import Ref, refs
from ..capture.program import Op, Program
from ..capture.recording import capture
from ..errors import GigamorphError, MorphError
from ..lowering.receptive_field import receptive_fields
from ..lowering.stages import lower
from ..torch_private import FakeTensor, FakeTensorMode, tree_leaves
from .running import eval_mode, failures

Shape = tuple[int, int, int, int]

# Names without in-place and operator spellings, which are stripped before the look-up.
_SCALING = frozenset({"add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide"})
_CARRYING = frozenset(
    "neg negative to type type_as float double half bfloat16 contiguous clone detach alias "
    "cat concat concatenate unsqueeze expand expand_as repeat getitem".split()
)


@dataclass(frozen=True)
class ImageReaders:
    """Readers of the image: paths of convolutions, the pixelwise affine steps before them, and other readers.

    A convolution is plain if its call is one ordinary `conv2d` with its own stored weight (no computed weight, no
    custom padding, no hooks, no second use). Only plain convolutions can be folded with a downsampler.
    """

    convs: tuple[str, ...]
    plain: tuple[bool, ...]
    before: tuple[str, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        kinds = [
            f"conv '{path}'" + ("" if p else " (not plain)") for path, p in zip(self.convs, self.plain, strict=True)
        ]
        steps = [*self.before, ", ".join([*kinds, *self.others])]
        return " -> ".join(["image", *steps])


@dataclass(frozen=True)
class InputSummary:
    """Image size, receptive field and stride (rows, columns), and the activation memory of stock autograd."""

    size: tuple[int, int]
    field: tuple[int, int]  # receptive field of the convolutions and poolings, in image pixels
    stride: tuple[int, int]  # image pixels between adjacent positions of the coarsest map
    activation_bytes: int

    def __str__(self) -> str:
        def pair(values: tuple[int, int]) -> str:
            return "{} x {}".format(*values)

        return (
            f"image {pair(self.size)}: receptive field {pair(self.field)}, stride {pair(self.stride)}, "
            f"activations {self.activation_bytes / 2**20:,.1f} MiB"
        )


def view(model: nn.Module, shape: Shape, example: Tensor, program: Program | None = None) -> InputSummary:
    """Compute receptive field, stride and activation memory on images of `shape` without allocating that size.

    Args:
        model: a network.
        shape: (N, C, H, W).
        example: an image batch; only its device matters.
        program: the network's record at that size, if there is one.

    Raises:
        MorphError: the network cannot be recorded at that size.
    """
    axes = [*zip(*receptive_fields(lower(program or record(model, shape, example), "untiled")).values(), strict=True)]
    rows, columns = ((ceil(max(f.extent for f in axis)), ceil(max(f.stride for f in axis))) for axis in axes)
    field, stride = zip(rows, columns, strict=True)
    return InputSummary((shape[2], shape[3]), field, stride, activation_bytes(model, shape, example))


def record(model: nn.Module, shape: tuple[int, ...], example: Tensor) -> Program:
    """Record the program of the network in eval mode; refusals become a MorphError."""
    try:
        with eval_mode(model), failures(f"the network cannot be run on an image of {tuple(shape)}"):
            return capture(model, shape, _dtype(model, example), example.device)
    except MorphError:
        raise
    except GigamorphError as error:
        raise MorphError(f"the network cannot be recorded: {error}") from error


def _dtype(model: nn.Module, example: Tensor) -> torch.dtype:
    """Return the dtype of the network's weights, because the example only determines shape and device."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)


def activation_bytes(model: nn.Module, shape: Shape, example: Tensor) -> int:
    """Return the bytes that stock autograd stores for backward in eval mode; each storage once, without weights."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stored: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):  # excludes parameters, which are real tensors
            storage = tensor.untyped_storage()
            stored[storage._cdata] = storage
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with eval_mode(model), torch.enable_grad(), fake, saving:
        model(torch.empty(shape, dtype=_dtype(model, example), device=example.device))
    return sum(storage.nbytes() for storage in stored.values())


def find_stem(model: nn.Module, program: Program) -> ImageReaders:
    """Find the convolutions that read the image.

    Args:
        model: any network that takes one image batch; it is not changed.
        program: its record.

    Raises:
        MorphError: the network does not read its image, or returns it.
    """
    affine, before, readers = {program.image}, [], []
    for op in program.ops:
        if not affine.intersection(op.inputs):
            continue
        if _is_affine(op, program, affine):
            affine.update(op.outputs)
            before.append(_plain_name(op))
        else:
            readers.append(op)
    if any(isinstance(leaf, Ref) and leaf.value in affine for leaf in tree_leaves(program.output)):
        raise MorphError("the network returns its image, which a front cannot preserve; return only what it computes")
    if not readers:
        raise MorphError("the network does not read its image; give a network that takes one image batch")
    modules = dict(model.named_modules(remove_duplicate=False))
    convs = [op for op in readers if isinstance(modules.get(op.module), nn.Conv2d)]
    paths = tuple(dict.fromkeys(op.module for op in convs))
    plain = tuple(_is_plain(modules[path], path, program, affine) for path in paths)  # pyright: ignore
    others = tuple(dict.fromkeys(f"'{op.name}' in {op.module or 'the model'}" for op in readers if op not in convs))
    return ImageReaders(paths, plain, tuple(dict.fromkeys(before)), others)


def _plain_name(op: Op) -> str:
    name = op.name.strip("_")
    if name[:1] == "i" and name[1:] in _SCALING | {"truediv"}:  # __itruediv__
        name = name[1:]
    return {"truediv": "div", "radd": "add", "rmul": "mul"}.get(name, name)  # rdiv is missing: it is not affine


def _is_affine(op: Op, program: Program, affine: set[int]) -> bool:
    """Return whether a step applies the same affine map to each pixel, so that it commutes with averaging."""
    height_width = program.values[program.image].shape[-2:]
    name = _plain_name(op)
    if any(program.values[out].shape[-2:] != height_width for out in op.outputs):
        return False
    images = [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Ref) and leaf.value in affine]
    constants = [program.values[n] for n in op.inputs if n not in affine]
    if any(len(v.shape) >= 1 and (*([1] * 2), *v.shape)[-2:] != (1, 1) for v in constants):
        return False  # an operand varies over the pixels
    if name in _SCALING:
        if not name.startswith(("mul", "div", "true")):
            return True
        divisor = name.startswith(("div", "true")) and refs((op.args, op.kwargs))[0] not in affine
        return len(images) == 1 and not divisor and "rounding_mode" not in op.kwargs
    if name == "getitem":
        keys = tree_leaves(op.args[1])
        return all(key is None or key is Ellipsis or isinstance(key, (int, slice)) for key in keys)
    return name in _CARRYING and not constants


def _is_plain(module: nn.Conv2d, path: str, program: Program, affine: set[int]) -> bool:
    cls = type(module)
    if cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward:
        return False
    if module._forward_hooks or module._forward_pre_hooks or "weight" not in module._parameters:
        return False
    calls = [op for op in program.ops if op.module == path and op.name == "conv2d"]
    names = {program.values[op.inputs[1]].name for op in calls}
    uses = [op for op in program.ops if names.intersection(program.values[n].name for n in op.inputs)]
    pads = [op for op in program.ops if op.module == path and op.name == "pad"]  # of padding modes other than zeros
    entered = {op.outputs[0] for op in pads if affine.intersection(op.inputs)}
    return all(op.name == "conv2d" and op.module == path and op.inputs[0] in affine | entered for op in uses)

"""From images to volumes: child(v) computes each slice of v (N, C, D, H, W) as the parent computes an image.

Kernels, pooling windows and strides get a depth of one, so that no layer mixes slices. Global pooling is the mean over
the slices, too. With the slices in the batch of the parent,

    child(v)[:, :, d] = parent(v[:, :, d])           for maps,
    child(v)          = mean over d of parent(v[:, :, d])    for vectors, if the layers after the pooling are linear.

Both hold in train mode, too: the statistics of a slice in the batch and in a volume are the same. `grow_kernel` then
gives convolutions a depth, with zeros in the new planes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError
from ..torch_private import tree_map_only
from .step import Edit, Report
from .surgery import morphed, plain, replace
from .verify import OtherFunction

SLICES = 3  # of the volume on which the morph is checked


def to_volume(model: nn.Module, example: Tensor, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Convert a network for images into one for volumes that computes the same function slice by slice.

    A classifier returns the mean of the parent's outputs over the slices, a network with maps one map for each slice.

    Args:
        model: the network; the morph changes a copy unless `inplace`.
        example: an image batch (N, C, H, W) of the parent.
        inplace: change `model` itself after the check.

    Raises:
        MorphError: a layer has no form for volumes, or the child computes another function: layers after the global
            pooling that are not linear, or code that reads the number of dimensions.
    """
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise MorphError("to_volume: the example must be one image batch (N, C, H, W) of the network")
    volume = torch.stack([example] * SLICES, 2)
    try:
        return morphed(model, VolumeStep(), volume, inplace=inplace, view=lambda *pair: (BySlice(pair[0]), pair[1]))
    except MorphError as error:
        if isinstance(error.__cause__, OtherFunction):
            raise MorphError(
                "to_volume: the child differs from the mean of its parent over the slices: a layer after the global "
                "pooling is not linear, or the code of a module reduces fixed dimensions; the original is unchanged"
            ) from error
        raise


class BySlice(nn.Module):
    """A module for images on each slice of volumes; vectors that it returns are averaged over the slices."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, volume: Tensor) -> Any:
        n, _, depth, *_ = volume.shape

        def joined(result: Tensor) -> Tensor:
            result = result.unflatten(0, (n, depth))
            return result.mean(1) if result.dim() < 5 else result.transpose(1, 2)

        return tree_map_only(Tensor, joined, self.module(volume.transpose(1, 2).flatten(0, 1)))


@dataclass(frozen=True)
class VolumeStep(Edit, op="volume"):
    """Step of `to_volume`."""

    def edit(self, model: nn.Module) -> list[str]:
        lines, done = [], set[nn.Module]()
        for path, module in list(model.named_modules()):
            kind = type(module)
            change = _CHANGED.get(kind) or _OF_TIMM.get(kind.__name__)
            if path and change is not None and module not in done:
                if kind in _WITH_WEIGHT:
                    plain(model, path, kind)
                done.update(module.modules() if change is BySlice else ())
                replace(model, path, change(module))
                lines.append(f"{path}: {kind.__name__} -> {type(model.get_submodule(path)).__name__}")
        if not lines:
            raise MorphError("to_volume: the network has no layer for images")
        return lines


def _deep(value: Any, first: int = 1) -> Any:
    """A kernel size, stride or the like with a first number for the depth; names of paddings stay."""
    return value if isinstance(value, str) else (first, *((value,) * 2 if isinstance(value, int) else tuple(value)))


def _conv(old: Any) -> nn.Module:
    kind = nn.ConvTranspose3d if isinstance(old, nn.ConvTranspose2d) else nn.Conv3d
    new: Any = kind(
        old.in_channels,
        old.out_channels,
        _deep(old.kernel_size),
        _deep(old.stride),
        _deep(old.padding, 0),
        groups=old.groups,
        bias=False,
        dilation=_deep(old.dilation),
        padding_mode=old.padding_mode,
        device="meta",
        **({"output_padding": _deep(old.output_padding, 0)} if kind is nn.ConvTranspose3d else {}),
    )
    new.weight = nn.Parameter(old.weight.detach().unsqueeze(2), requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    return new


class NormAct3d(nn.BatchNorm3d):
    """BatchNorm, dropout and activation, as timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _norm(old: Any, kind: Any) -> nn.Module:
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    for name, tensor in (*old._parameters.items(), *old._buffers.items()):
        setattr(new, name, tensor)
    for name, child in old.named_children():
        setattr(new, name, child)
    return new


def _max_pool(old: Any) -> nn.Module:
    sizes = _deep(old.kernel_size), _deep(old.stride), _deep(old.padding, 0), _deep(old.dilation)
    return nn.MaxPool3d(*sizes, old.return_indices, old.ceil_mode)


def _average_pool(old: Any) -> nn.Module:
    sizes = _deep(old.kernel_size), _deep(old.stride), _deep(old.padding, 0)
    return nn.AvgPool3d(*sizes, old.ceil_mode, old.count_include_pad, old.divisor_override)


def _adaptive_pool(old: Any) -> nn.Module:
    size = _deep(old.output_size, 0)[1:]
    return nn.AdaptiveAvgPool3d(1 if size == (1, 1) else (None, *size))


def _upsample(old: Any) -> nn.Module:
    mode = {"bilinear": "trilinear"}.get(old.mode, old.mode)
    if old.scale_factor is None or mode not in ("trilinear", "nearest", "nearest-exact"):
        raise MorphError(f"to_volume: Upsample with mode='{old.mode}' needs a scale_factor, and bilinear or nearest")
    scale = old.scale_factor if isinstance(old.scale_factor, tuple) else (old.scale_factor,) * 2
    return nn.Upsample(None, (1.0, *scale), mode, old.align_corners, old.recompute_scale_factor)


def _pad(kind: type[nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda old: kind((*old.padding, 0, 0), *([old.value] if hasattr(old, "value") else []))


_WITH_WEIGHT = (nn.Conv2d, nn.ConvTranspose2d)
_CHANGED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.BatchNorm2d: partial(_norm, kind=nn.BatchNorm3d),
    **dict.fromkeys((nn.InstanceNorm2d, nn.GroupNorm, nn.PixelShuffle, nn.PixelUnshuffle), BySlice),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Upsample: _upsample,
    nn.Dropout2d: lambda old: nn.Dropout3d(old.p, old.inplace),
    nn.ConstantPad2d: _pad(nn.ConstantPad3d),
    nn.ReflectionPad2d: _pad(nn.ReflectionPad3d),
    nn.ReplicationPad2d: _pad(nn.ReplicationPad3d),
    nn.ZeroPad2d: lambda old: nn.ConstantPad3d((*old.padding, 0, 0), 0.0),
}
_OF_TIMM: dict[str, Callable[[Any], nn.Module]] = {
    **dict.fromkeys(("SEModule", "SqueezeExcite", "EcaModule", "EffectiveSEModule", "LayerNorm2d"), BySlice),
    **dict.fromkeys(("ConvNeXtBlock", "SqueezeExcitation"), BySlice),  # the latter is torchvision's
    "BatchNormAct2d": partial(_norm, kind=NormAct3d),
    "FastAdaptiveAvgPool": lambda old: nn.Sequential(
        nn.AdaptiveAvgPool3d(1), nn.Flatten() if old.flatten else nn.Identity()
    ),
}

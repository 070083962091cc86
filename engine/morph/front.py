"""Front for larger images: child(x) == parent(downsample(x)), also at borders (MorphHR, arXiv 2101.07945).

A network that was trained on images shrunk by a factor r gets a front. The front reads the image at full size, and all
later layers get exactly their old inputs. If each pixel of the small image comes from its own r x r cell of the large
image, shrinking and the first convolution K are one convolution K ⊗ b. Here b holds the weights of a cell (1/r² each
for the mean), and kernel, stride and padding are r times as large. At a border K ⊗ b reads r times as many zeros, so it
agrees there too. Weights that overlap neighbouring cells (antialiasing) do not agree at borders, and mirrored padding
does not commute with the mean. These cases are refused; the downsampler can stay as a layer instead.

Stages compute the same mean by ordinary strided convolutions: for r = 2^j, j times 3x3/2 with the 2x2 mean in the taps
[1:, 1:], which never read the padding. Each stage has extra random filters. The next layer reads them with weight zero,
so they change nothing and learn from the first step. The residual front uses the downsampler D and learns
D(x) + gamma * g(x) from gamma = 0; it is exact in train mode for any batch statistics of g.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .activation import PAct, activation
from .copying import as_ordered, cast, channels_last, duplicate
from .example import as_inputs
from .other_sizes import other_inputs
from .stem import ImageReaders, InputSummary, find_stem, record, view
from .step import Report, Step
from .stock import as_given, stock
from .surgery import replace as replace_module
from .verify import OtherFunction, OtherShapes, verified_report

MODES = ("fold", "stages", "residual", "keep")
DOWNSAMPLERS = ("area", "bilinear", "antialias")


@dataclass(frozen=True)
class FrontReport(Report):
    """Report of a front, with the stem of the parent and the views of parent and child."""

    step: FrontStep
    stem: ImageReaders = None  # pyright: ignore[reportAssignmentType]
    before: InputSummary = None  # pyright: ignore[reportAssignmentType]
    after: InputSummary = None  # pyright: ignore[reportAssignmentType]


@torch.inference_mode(False)
@freed_pages_kept()
def front(
    model: nn.Module,
    example: Tensor,
    r: int,
    mode: str = "stages",
    *,
    downsample: str = "area",
    filters: int = 8,
    act: str | None = "ReLU",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, FrontReport]:
    """Add a front for images r times as large in both directions.

    The sides of the child's images must be multiples of r (crop or pad them). The child then computes what the parent
    computes on the shrunk image.

    Args:
        model: a network that takes one image batch; it is not changed unless `inplace`.
        example: an image batch (N, C, H, W) of the parent's size.
        r: the factor, at least 2.
        mode: ``"fold"`` (one convolution replaces each stem convolution), ``"stages"`` (strided convolutions before
            the stem, one for each prime factor of r), ``"residual"`` (the downsampler plus a learnt branch) or
            ``"keep"`` (the downsampler as first layer).
        downsample: how the parent's images were shrunk: ``"area"`` (mean of r x r pixels), ``"bilinear"`` or
            ``"antialias"`` (bilinear with antialiasing: only for "residual" and "keep").
        filters: filters of each stage; those beyond the image's channels are random.
        act: activation after each stage, as torch.nn prints it, or None. In "stages" it is a P-activation, which starts
            as the identity on the channels that carry the image.
        seed: seed of the random filters.
        size: (height, width) of the child's images, for the report; by default r times the example's.
        inplace: also change `model` itself after all checks.

    Returns:
        The child, and a report with the stem, receptive field, stride and activation memory.

    Raises:
        MorphError: the front cannot be exact; nothing is changed.
    """
    _check_arguments(example, r, mode, downsample, size)
    given, model = model, stock(model, inplace)
    height, width = size or (r * example.shape[2], r * example.shape[3])
    program = record(model, tuple(example.shape), example)
    stem = find_stem(model, program)
    large = example.repeat_interleave(r, 2).repeat_interleave(r, 3)
    asked = (example.shape[1], r, mode, downsample, filters, act, seed)
    step = plan_front(model, stem, *asked)
    try:
        child, report = _grown(step, model, large, inplace)
    except (OtherFunction, OtherShapes) as error:  # it branches by the image's size, or upsamples to that size
        if step.mode == "fold" and isinstance(error, OtherShapes):
            raise MorphError(
                "front: the network returns other shapes on the large image, probably because it upsamples to the "
                "image's size; use mode='stages', 'residual' or 'keep', which put the front before the whole network"
            ) from error
        if step.mode == "fold" or not step.at:
            raise
        step = plan_front(model, replace(stem, others=("the image's size",)), *asked)  # before the whole network
        child, report = _grown(step, model, large, inplace)
    small = (1, example.shape[1], height // r, width // r)
    before = view(model, small, example, program if small == tuple(example.shape) else None)
    after = view(child, (1, example.shape[1], height, width), example)
    changes = [f"found: {stem}", *step.describe(child), f"before: {before}", f"after: {after}"]
    changes += [f"the child's image sides must be multiples of {r}", *report.changes]
    report = replace(report, changes=changes)
    if inplace:
        child = step.repeat(model)
    return as_given(child, given), FrontReport(**vars(report), stem=stem, before=before, after=after)


def _grown(step: FrontStep, model: nn.Module, large: Tensor, inplace: bool) -> tuple[nn.Module, Report]:
    if inplace and not (step.at and step.at[0]):
        raise MorphError("this front wraps the whole network, which cannot be done in place; use inplace=False")
    child = step.repeat(duplicate(model))
    return child, _verified(step, model, child, large)


def _verified(step: FrontStep, model: nn.Module, child: nn.Module, large: Tensor) -> Report:
    """Check that the child on large images equals the network on shrunk ones, and return the report."""
    if step.mode in ("fold", "stages") and step.r & (step.r - 1):
        model = cast(duplicate(model), torch.float64)  # weights / r² are rounded, so the comparison uses float64
        child = step.repeat(duplicate(model))
    parent = nn.Sequential(downsampler(step.downsample, step.r), model)
    inputs = as_inputs(large)
    others = other_inputs(parent, inputs, step.r) | other_inputs(child, inputs, step.r)
    return verified_report(step, parent, child, large, seed=step.seed, others=others)


@dataclass(frozen=True)
class FrontStep(Step, op="front"):
    """Step of `front`.

    `at` lists the convolutions that it replaces; if it is empty the front is before the whole network. Mode "fold" has
    only the first five fields, mode "keep" also `channels` and `out`. `channels` of the image go in, `out` channels
    come out. `norm` is whether the branch of a residual front has BatchNorm.
    """

    mode: str
    r: int
    downsample: str
    seed: int
    at: tuple[str, ...]
    channels: int = 0
    out: int = 0
    filters: int = 0
    act: str | None = None
    norm: bool | None = None

    @property
    def extra(self) -> int:
        """Number of filters beyond the image's channels that reach the stem."""
        return self.out - self.channels

    def repeat(self, model: nn.Module) -> nn.Module:
        if self.mode == "fold":
            for path in self.at:
                conv = _conv_at(model, path)
                model = _replace(model, path, folded(conv, self.r, self.downsample))
            return model
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        layers = as_ordered(self._layers(like), model)
        layers.train(model.training)
        if not self.at:
            whole = nn.Sequential(OrderedDict(front=layers, body=model))
            whole.training = model.training
            return whole
        conv = _conv_at(model, self.at[0])
        pair = nn.Sequential(OrderedDict(front=layers, conv=conv)).train(conv.training)
        child = _replace(model, self.at[0], pair)
        if self.extra > 0:
            add_zero_columns(conv, self.extra)
        return child

    def _layers(self, like: Tensor) -> nn.Module:
        if self.mode == "keep":
            return downsampler(self.downsample, self.r)
        if not (self.channels and self.filters and self.out):
            raise MorphError(f"front: mode='{self.mode}' needs channels, filters and out")
        generator = torch.Generator().manual_seed(self.seed)  # for the random filters
        return (stages if self.mode == "stages" else residual)(self, like, generator)

    def describe(self, child: nn.Module) -> list[str]:
        """Return report lines on the new layers."""
        if self.mode == "fold":
            return [_folded_line(path, _conv_at(child, path)) for path in self.at]
        where = f"conv '{self.at[0]}'" if self.at else "the network"
        what = {
            "stages": f"{len(prime_factors(self.r))} stages ({self.downsample})",
            "residual": f"the {self.downsample} downsampler plus a branch with gamma = 0",
            "keep": f"the {self.downsample} downsampler as a layer",
        }
        extra = f"; {self.extra} random filters with zero outgoing weight" if self.extra > 0 else ""
        return [f"before {where}: {what[self.mode]}{extra}"]


# --------------------------------------------------------------------------------------------------------------------


def _check_arguments(example: Tensor, r: int, mode: str, downsample: str, size: tuple[int, int] | None) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise MorphError("front: the example must be one image batch (N, C, H, W)")
    if not isinstance(r, int) or r < 2:
        raise MorphError(f"front: r must be an integer of at least 2, not {r!r}")
    if mode not in MODES:
        raise MorphError(f"front: unknown mode={mode!r}; choose from {', '.join(MODES)}")
    if downsample not in DOWNSAMPLERS:
        raise MorphError(f"front: unknown downsample={downsample!r}; choose from {', '.join(DOWNSAMPLERS)}")
    for side, name in zip(size or (), ("height", "width"), strict=False):
        if side % r or side < r:
            raise MorphError(
                f"front: image {name} {side} is not a multiple of r={r}, so its border would not be exact; crop the "
                f"image to {side - side % r} or pad it to {side + -side % r}"
            )
    if mode in ("fold", "stages") and downsample == "antialias":
        raise MorphError(
            f"front: mode='{mode}' cannot be exact with antialiasing, because its filters overlap and are cut off at "
            "the borders; use mode='residual' or 'keep'"
        )
    if mode == "stages" and downsample == "bilinear" and r % 4 == 0:
        raise MorphError(
            f"front: mode='stages' cannot compute bilinear shrinking by {r}, which reads the middle 2 x 2 pixels of "
            "each cell; use mode='fold'"
        )


def plan_front(
    model: nn.Module,
    stem: ImageReaders,
    channels: int,
    r: int,
    mode: str,
    downsample: str,
    filters: int,
    act: str | None,
    seed: int,
) -> FrontStep:
    """Plan the step of a front on this stem; `channels` is the number of image channels, the rest is as in `front`."""
    if mode == "fold":
        _require_foldable(model, stem)
        return FrontStep(mode, r, downsample, seed, stem.convs)
    single_conv = len(stem.convs) == 1 and not stem.others
    if single_conv:
        channels = _conv_at(model, stem.convs[0]).in_channels
    if mode == "stages" and filters < channels:
        raise MorphError(f"front: filters={filters} must be at least {channels}, the number of image channels")
    step = FrontStep(mode, r, downsample, seed, stem.convs if single_conv else (), channels, channels)
    if mode == "stages":
        # Zero columns of the stem read the extra filters of the last stage; without a plain stem there are no extras.
        widen = single_conv and stem.plain[0] and _conv_at(model, stem.convs[0]).groups == 1
        return replace(step, filters=filters, act=act, out=filters if widen else channels)
    if mode == "residual":
        norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        return replace(step, filters=filters, act=act, norm=norm)
    return step


def _require_foldable(model: nn.Module, stem: ImageReaders) -> None:
    remedy = "use mode='residual' or 'keep' to keep the downsampler, or mode='stages' to put convolutions before it"
    if stem.others:
        raise MorphError(f"front: {stem.others[0]} also reads the image and cannot be folded; {remedy}")
    for path, plain in zip(stem.convs, stem.plain, strict=True):
        conv = _conv_at(model, path)
        if not plain:
            raise MorphError(
                f"module '{path}' ({type(conv).__name__}) is not a plain convolution with its own stored weight, so it "
                f"cannot be folded; {remedy}"
            )
        if conv.padding_mode not in ("zeros", "circular"):
            raise MorphError(
                f"module '{path}' has padding_mode='{conv.padding_mode}', which does not commute with shrinking at the "
                f"borders; {remedy}"
            )


def _folded_line(path: str, conv: nn.Conv2d) -> str:
    kernel, stride, padding = ("{}x{}".format(*v) for v in (conv.kernel_size, conv.stride, conv.padding))
    return f"conv '{path}' now includes the downsampler: kernel {kernel}, stride {stride}, padding {padding}"


def _conv_at(model: nn.Module, path: str) -> nn.Conv2d:
    try:
        conv = model.get_submodule(path)
    except AttributeError as error:
        raise MorphError(f"front: the network has no module '{path}'; use the architecture of the recipe") from error
    if not isinstance(conv, nn.Conv2d):
        raise MorphError(f"front: module '{path}' is a {type(conv).__name__}, not a convolution")
    return conv


def _replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Replace the module at `path`, which may be the model itself."""
    if not path:
        return new
    replace_module(model, path, new)
    return model


class Resize(nn.Module):
    """Bilinear resize (N, C, rH, rW) -> (N, C, H, W), optionally antialiased."""

    def __init__(self, r: int, antialias: bool) -> None:
        super().__init__()
        self.r, self.antialias = r, antialias

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] // self.r, x.shape[-1] // self.r)
        return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.antialias)

    def extra_repr(self) -> str:
        return f"r={self.r}, antialias={self.antialias}"


class ResidualFront(nn.Module):
    """down(x) + gamma * branch(x), with one gamma per channel that starts at zero."""

    def __init__(self, down: nn.Module, branch: nn.Module, channels: int, like: Tensor) -> None:
        super().__init__()
        self.down, self.branch = down, branch
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.gamma * self.branch(x)


def downsampler(name: str, r: int) -> nn.Module:
    """Build the layer that shrinks by r: the mean of each r x r cell ("area"), "bilinear" or "antialias"."""
    if name == "area" or (name == "bilinear" and r == 2):  # the same function
        return nn.AvgPool2d(r)
    return Resize(r, antialias=name == "antialias")


def cell_weights(downsample: str, r: int) -> Tensor:
    """Return the weights of a cell's r pixels along one axis, in float64."""
    cell = torch.full((r,), 1 / r, dtype=torch.float64)
    if downsample == "bilinear":  # without antialiasing it reads the one or two middle pixels
        cell.zero_()
        cell[(r - 1) // 2] += 0.5
        cell[r // 2] += 0.5
    return cell


def folded(conv: nn.Conv2d, r: int, downsample: str) -> nn.Conv2d:
    """Build one convolution that equals `conv` after the downsampler; a dilated kernel becomes dense, with zeros."""
    weight = conv.weight.detach()
    kernel = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    dense = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    dense[:, :, :: conv.dilation[0], :: conv.dilation[1]] = weight.double()
    # In float64 until the end, so that each weight is rounded only once, and not at all for r = 2^j.
    cell = cell_weights(downsample, r)
    cells = torch.outer(cell, cell).reshape(1, 1, r, r).to(dense.device)
    large = torch.kron(dense, cells)
    padding, ahead = [0, 0], [0, 0]
    for axis in (0, 1):
        if conv.padding == "same":  # an even kernel pads one more at the end; zero taps at the front make it symmetric
            total = kernel[axis] - 1
            padding[axis] = (total - total // 2) * r
            ahead[axis] = (total % 2) * r
        elif conv.padding != "valid":
            padding[axis] = int(conv.padding[axis]) * r
    large = F.pad(large, (ahead[1], 0, ahead[0], 0))
    new = _new_conv(
        weight,
        conv.in_channels,
        conv.out_channels,
        tuple(large.shape[2:]),
        (conv.stride[0] * r, conv.stride[1] * r),
        tuple(padding),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    new.weight = nn.Parameter(large.to(weight.dtype), requires_grad=conv.weight.requires_grad)
    new.bias = conv.bias
    new.training = conv.training
    return new


def prime_factors(r: int) -> list[int]:
    """Return the prime factors of r in ascending order."""
    factors, p = [], 2
    while r > 1:
        while r % p == 0:
            factors.append(p)
            r //= p
        p += 1
    return factors


def stages(step: FrontStep, like: Tensor, generator: torch.Generator) -> nn.Sequential:
    """Build a strided convolution for each prime factor of r; the first channels carry the shrunk image."""
    layers, width, factors = nn.Sequential(), step.channels, prime_factors(step.r)
    for number, factor in enumerate(factors):
        out = step.out if number == len(factors) - 1 else step.filters
        conv = _stage(width, out, factor, like, generator)
        _set_cell(conv, step.channels, cell_weights(step.downsample, factor))
        layers.append(conv)
        if step.act is not None:
            pact = PAct(activation(step.act), out)
            with torch.no_grad():
                pact.a[step.channels :] = 1  # the extra filters change nothing yet, so they can be non-linear at once
            layers.append(pact.to(like.device, like.dtype))
        width = out
    return layers


def residual(step: FrontStep, like: Tensor, generator: torch.Generator) -> ResidualFront:
    """Build the downsampler plus gamma = 0 times a branch of random strided convolutions."""
    layers, width = nn.Sequential(), step.channels
    for factor in prime_factors(step.r):
        layers.append(_stage(width, step.filters, factor, like, generator))
        if step.norm:
            layers.append(nn.BatchNorm2d(step.filters, dtype=like.dtype, device=like.device))
        if step.act is not None:
            layers.append(activation(step.act).to(like.device, like.dtype))
        width = step.filters
    end = _new_conv(like, width, step.channels, 1)
    _randomize(end, generator)
    return ResidualFront(downsampler(step.downsample, step.r), layers.append(end), step.channels, like)


def add_zero_columns(conv: nn.Conv2d, count: int) -> None:
    """Extend a convolution by `count` input channels with weight zero."""
    weight = conv.weight.detach()
    zeros = weight.new_zeros(weight.shape[0], count, *weight.shape[2:])
    wider = torch.cat([weight, zeros], 1).contiguous(memory_format=channels_last(weight) or torch.contiguous_format)
    conv.weight = nn.Parameter(wider, requires_grad=conv.weight.requires_grad)
    conv.in_channels += count


def _new_conv(like: Tensor, *args: Any, **kwargs: Any) -> nn.Conv2d:
    """Allocate a Conv2d without initial values, so that the global random generator does not advance."""
    return nn.utils.skip_init(nn.Conv2d, *args, dtype=like.dtype, device=like.device, **kwargs)  # pyright: ignore


def _stage(inputs: int, out: int, factor: int, like: Tensor, generator: torch.Generator) -> nn.Conv2d:
    """Build a convolution that shrinks by a prime: 3x3/2 for two, otherwise kernel size equals stride."""
    conv = _new_conv(like, inputs, out, 3, 2, 1) if factor == 2 else _new_conv(like, inputs, out, factor, factor)
    _randomize(conv, generator)
    return conv


def _randomize(conv: nn.Conv2d, generator: torch.Generator) -> None:
    """Apply He initialisation with the given generator."""
    weight = conv.weight
    std = (2 / weight[0].numel()) ** 0.5
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * std)
        assert conv.bias is not None
        conv.bias.zero_()


def _set_cell(conv: nn.Conv2d, channels: int, cell: Tensor) -> None:
    """Set the first `channels` filters so that each shrinks one channel and reads nothing else."""
    with torch.no_grad():
        conv.weight[:channels] = 0
        offset = conv.kernel_size[0] - len(cell)  # the taps [1:, 1:] of 3x3/2 with padding 1 never read the padding
        for c in range(channels):
            conv.weight[c, c, offset:, offset:] = torch.outer(cell, cell).to(conv.weight)

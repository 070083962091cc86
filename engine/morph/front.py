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

import torch
from torch import Tensor, nn

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .copying import as_ordered, cast, duplicate
from .example import as_inputs
from .front_layers import Filters, add_zero_columns, downsampler, folded, prime_factors, residual, stages
from .other_sizes import other_inputs
from .stem import Stem, View, find_stem, view
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
    stem: Stem = None  # pyright: ignore[reportAssignmentType]
    before: View = None  # pyright: ignore[reportAssignmentType]
    after: View = None  # pyright: ignore[reportAssignmentType]


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
    stem = find_stem(model, example)
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
    before = view(model, (1, example.shape[1], height // r, width // r), example)
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
    channels: int | None = None
    out: int | None = None
    filters: int | None = None
    act: str | None = None
    norm: bool | None = None

    @property
    def extra(self) -> int:
        """Number of filters beyond the image's channels that reach the stem."""
        return 0 if self.out is None or self.channels is None else self.out - self.channels

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
        if self.channels is None or self.filters is None or self.out is None:
            raise MorphError(f"front: mode='{self.mode}' needs channels, filters and out")
        generator = torch.Generator().manual_seed(self.seed)
        of = Filters(self.channels, self.filters, self.out, self.act, bool(self.norm), generator)
        return (stages if self.mode == "stages" else residual)(self.r, self.downsample, of, like)

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
    stem: Stem,
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


def _require_foldable(model: nn.Module, stem: Stem) -> None:
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

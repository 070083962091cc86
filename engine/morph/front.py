"""The front for larger images: child(x) == parent(downsample(x)), borders included (MorphHR, arXiv 2101.07945).

A network that was trained on images shrunk by a factor r gets a front that reads the image at full size and leaves
everything behind it with exactly its old inputs. Where each pixel of the small image comes from its own r x r cell of
the large one, shrinking and the first convolution K are one convolution: K ⊗ b, with kernel, stride and padding r times
as large, where b is the cell's weights (1/r² each for the mean). At a border K then reads r times as many zeros, so it
agrees there too. Weights that overlap their neighbours' cells (antialiasing) do not agree at borders, and mirrored
padding does not commute with the mean; these are refused, and the downsampler can be kept as a layer.

In stages the same mean is made by ordinary strided convolutions: for r = 2^j, j times 3x3/2 with the 2x2 mean in the
taps [1:, 1:], which never read the padding. Each stage has extra random filters; what comes after reads them with
weight zero, so that they change nothing and learn from the first step on. The residual front keeps the downsampler D
and learns D(x) + gamma * g(x) from gamma = 0; it is exact in train mode whatever batch statistics g has.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .activation import PAct, activation
from .stem import Stem, View, find_stem, view
from .verify import Report, cast, duplicate, verified_report

MODES = ("fold", "stages", "residual", "keep")
DOWNSAMPLERS = ("area", "bilinear", "antialias")

Step = dict[str, Any]


@dataclass(frozen=True)
class FrontReport(Report):
    """A morph's report with the stem that was found and what parent and child see of their images."""

    stem: Stem = None  # pyright: ignore[reportAssignmentType]
    before: View = None  # pyright: ignore[reportAssignmentType]
    after: View = None  # pyright: ignore[reportAssignmentType]


class Resize(nn.Module):
    """(N, C, rH, rW) -> (N, C, H, W), bilinear; antialiased on request."""

    def __init__(self, r: int, antialias: bool) -> None:
        super().__init__()
        self.r, self.antialias = r, antialias

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] // self.r, x.shape[-1] // self.r)
        return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.antialias)

    def extra_repr(self) -> str:
        return f"r={self.r}, antialias={self.antialias}"


class ResidualFront(nn.Module):
    """down(x) + gamma * branch(x), with one gamma for each channel, zero at the start."""

    def __init__(self, down: nn.Module, branch: nn.Module, channels: int, like: Tensor) -> None:
        super().__init__()
        self.down, self.branch = down, branch
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.gamma * self.branch(x)


def downsampler(name: str, r: int) -> nn.Module:
    """The layer that shrinks by r: the mean of each r x r cell ("area"), or bilinear without or with antialiasing."""
    if name == "area" or (name == "bilinear" and r == 2):  # the same function
        return nn.AvgPool2d(r)
    return Resize(r, antialias=name == "antialias")


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
    """Give a network a front for images r times as large in both directions.

    The sides of the child's images must be multiples of r (crop or pad them); it then computes what the parent does on
    the shrunk image.

    Args:
        model: a network that takes one image batch; it stays as it is unless `inplace`.
        example: an image batch (N, C, H, W) of the parent's size.
        r: factor, at least 2.
        mode: ``"fold"`` (one convolution in place of each stem convolution), ``"stages"`` (strided convolutions
            before the stem, one for each prime factor of r), ``"residual"`` (the downsampler plus a learnt branch) or
            ``"keep"`` (the downsampler as first layer).
        downsample: how the parent's images were shrunk: ``"area"`` (mean of r x r pixels), ``"bilinear"`` or
            ``"antialias"`` (bilinear with antialiasing: only for "residual" and "keep").
        filters: filters of each stage; those beyond the image's channels are random.
        act: activation behind each stage, as torch.nn prints it, or None. In "stages" it is a P-activation: the
            identity on the channels that carry the image, until it is learnt.
        seed: of the random filters.
        size: (height, width) of the child's images, for the report; r times the example's by default.
        inplace: also change `model` itself, once all checks have passed.

    Returns:
        The child, and a report with the stem that was found, receptive field, stride and activation memory.

    Raises:
        MorphError: what is asked cannot be exact; nothing has changed.
    """
    _check_arguments(example, r, mode, downsample, size)
    height, width = size or (r * example.shape[2], r * example.shape[3])
    stem = find_stem(model, example)
    step = _step(model, stem, example.shape[1], r, mode, downsample, filters, act, seed)
    if inplace and not (step["at"] and step["at"][0]):
        raise MorphError("this front stands before the whole network, which cannot become it; use inplace=False")
    child = repeat(duplicate(model), step)
    before = view(model, (1, example.shape[1], height // r, width // r), example)
    after = view(child, (1, example.shape[1], height, width), example)
    checked = model, child
    if mode in ("fold", "stages") and r & (r - 1):  # weights over r² are rounded: compare with float64 weights
        exact = cast(duplicate(model), torch.float64)
        checked = exact, repeat(duplicate(exact), step)
    changes = [f"found: {stem}", *_describe(child, step), f"before: {before}", f"after: {after}"]
    changes.append(f"the child's image sides must be multiples of {r}")
    parent = nn.Sequential(downsampler(downsample, r), checked[0])
    large = example.new_zeros(example.shape[0], example.shape[1], r * example.shape[2], r * example.shape[3])
    report = verified_report(step, parent, checked[1], large, changes=changes, seed=seed)
    if inplace:
        child = repeat(model, step)
    return child, FrontReport(**vars(report), stem=stem, before=before, after=after)


def repeat(model: nn.Module, step: Step) -> nn.Module:
    """Carry out a front's step on a network, with the weights it has; the network is changed or wrapped.

    Args:
        model: of the architecture that the step was made for; its weights may be on the meta device.
        step: `Report.step` of `front`.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(step["seed"])
    if step["mode"] == "fold":
        for path in step["at"]:
            conv = _conv(model, path)
            model = _replace(model, conv, _fold(conv, step["r"], _cell(step["downsample"], step["r"])))
        return model
    layers = _front(step, like, generator)
    layers.train(model.training)
    if not step["at"]:
        whole = nn.Sequential(OrderedDict(front=layers, body=model))
        whole.training = model.training
        return whole
    conv = _conv(model, step["at"][0])
    pair = nn.Sequential(OrderedDict(front=layers, conv=conv))
    pair.training = conv.training
    child = _replace(model, conv, pair)
    if step["out"] > step["channels"]:
        _add_zero_columns(conv, step["out"] - step["channels"])
    return child


# --------------------------------------------------------------------------------------------------------------------


def _check_arguments(example: Tensor, r: int, mode: str, downsample: str, size: tuple[int, int] | None) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise MorphError("front: the example must be one image batch (N, C, H, W)")
    if not isinstance(r, int) or r < 2:
        raise MorphError(f"front: r={r!r} must be an integer of at least 2")
    if mode not in MODES:
        raise MorphError(f"front: mode={mode!r} is not known; take one of {', '.join(MODES)}")
    if downsample not in DOWNSAMPLERS:
        raise MorphError(f"front: downsample={downsample!r} is not known; take one of {', '.join(DOWNSAMPLERS)}")
    for side, name in zip(size or (), ("height", "width"), strict=False):
        if side % r or side < r:
            raise MorphError(
                f"front: image {name} {side} is not a multiple of r={r}, so its border would not be exact; crop the "
                f"image to {side - side % r} or pad it to {side + -side % r}"
            )
    if mode in ("fold", "stages") and downsample == "antialias":
        raise MorphError(
            f"front: mode='{mode}' cannot be exact for an antialiased downsampler, whose filters overlap and are cut "
            "off at the borders; mode='residual' or 'keep' keeps it as a layer"
        )
    if mode == "stages" and downsample == "bilinear" and r % 4 == 0:
        raise MorphError(
            f"front: bilinear shrinking by {r} takes the middle 2 x 2 of each cell, which no chain of stages computes; "
            "mode='fold' does"
        )


def _step(
    model: nn.Module,
    stem: Stem,
    channels: int,
    r: int,
    mode: str,
    downsample: str,
    filters: int,
    act: str | None,
    seed: int,
) -> Step:
    """What to do, as JSON: `at` are the convolutions that are replaced; none means before the whole network."""
    step: Step = {"op": "front", "mode": mode, "r": r, "downsample": downsample, "seed": seed}
    if mode == "fold":
        _require_foldable(model, stem)
        return {**step, "at": list(stem.convs)}
    alone = len(stem.convs) == 1 and not stem.others
    if alone:
        channels = _conv(model, stem.convs[0]).in_channels
    if mode == "stages" and filters < channels:
        raise MorphError(f"front: filters={filters} are fewer than the {channels} channels that they must carry")
    step |= {"at": list(stem.convs) if alone else [], "channels": channels, "out": channels}
    if mode == "stages":
        # Extra filters of the last stage end in zero columns of the stem; without such a stem it has none.
        widen = alone and stem.plain[0] and _conv(model, stem.convs[0]).groups == 1
        step |= {"filters": filters, "act": act, "out": filters if widen else channels}
    if mode == "residual":
        norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        step |= {"filters": filters, "act": act, "norm": norm}
    return step


def _require_foldable(model: nn.Module, stem: Stem) -> None:
    remedy = "mode='residual' or 'keep' keeps the downsampler, mode='stages' puts convolutions before it"
    if stem.others:
        raise MorphError(f"front: the image is also read by {stem.others[0]}, which cannot be folded; {remedy}")
    for path, plain in zip(stem.convs, stem.plain, strict=True):
        conv = _conv(model, path)
        if not plain:
            raise MorphError(
                f"module '{path}' ({type(conv).__name__}) is no plain convolution with a stored weight of its own, so "
                f"it cannot be folded; {remedy}"
            )
        if conv.padding_mode not in ("zeros", "circular"):
            raise MorphError(
                f"module '{path}' pads by padding_mode='{conv.padding_mode}', which does not commute with shrinking at "
                f"the borders; {remedy}"
            )


def _describe(child: nn.Module, step: Step) -> list[str]:
    """What is new, for the report."""
    if step["mode"] == "fold":
        text = []
        for path in step["at"]:
            conv = _conv(child, path)
            kernel, stride, padding = ("{}x{}".format(*v) for v in (conv.kernel_size, conv.stride, conv.padding))
            text.append(
                f"conv '{path}' with the downsampler in it: kernel {kernel}, stride {stride}, padding {padding}"
            )
        return text
    where = f"conv '{step['at'][0]}'" if step["at"] else "the network"
    what = {
        "stages": f"{len(_factors(step['r']))} stages ({step['downsample']})",
        "residual": f"the {step['downsample']} downsampler, kept, plus a branch with gamma = 0",
        "keep": f"the {step['downsample']} downsampler, kept as a layer",
    }
    extra = f"; {step['out'] - step['channels']} random filters with zero outgoing weight"
    return [f"before {where}: {what[step['mode']]}{extra if step['out'] > step['channels'] else ''}"]


def _conv(model: nn.Module, path: str) -> nn.Conv2d:
    try:
        conv = model.get_submodule(path)
    except AttributeError as error:
        raise MorphError(f"front: the network has no module '{path}'; is it the architecture of the recipe?") from error
    if not isinstance(conv, nn.Conv2d):
        raise MorphError(f"front: module '{path}' is a {type(conv).__name__}, not a convolution")
    return conv


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands (a shared module stands at several places)."""
    if model is old:
        return new
    for module in [m for m in model.modules() if m is not new]:
        for name, part in module._modules.items():
            if part is old:
                module._modules[name] = new
    return model


def _cell(downsample: str, r: int) -> Tensor:
    """Weights of a cell's r pixels along one axis, float64."""
    cell = torch.full((r,), 1 / r, dtype=torch.float64)
    if downsample == "bilinear":  # without antialiasing: the one or two pixels in the middle
        cell.zero_()
        cell[(r - 1) // 2] += 0.5
        cell[r // 2] += 0.5
    return cell


def _new_conv(like: Tensor, *args: Any, **kwargs: Any) -> nn.Conv2d:
    """A Conv2d with memory but without values, so that no global random number is drawn."""
    return nn.utils.skip_init(nn.Conv2d, *args, dtype=like.dtype, device=like.device, **kwargs)  # pyright: ignore


def _fold(conv: nn.Conv2d, r: int, cell: Tensor) -> nn.Conv2d:
    """One convolution for `conv` behind the downsampler; a dilated kernel becomes a dense one with zeros."""
    weight = conv.weight.detach()
    kernel = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    dense = weight.new_zeros(*weight.shape[:2], *kernel, dtype=torch.float64)
    dense[:, :, :: conv.dilation[0], :: conv.dilation[1]] = weight.double()
    # float64 until the end: each weight is rounded once, and not at all for r = 2^j.
    cells = torch.outer(cell, cell).reshape(1, 1, r, r).to(dense.device)
    large = torch.kron(dense, cells)
    padding, ahead = [0, 0], [0, 0]
    for axis in (0, 1):
        if conv.padding == "same":  # of an even kernel, one more at the end: taps of zero at the front make it even
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


def _factors(r: int) -> list[int]:
    """Prime factors, ascending."""
    factors, p = [], 2
    while r > 1:
        while r % p == 0:
            factors.append(p)
            r //= p
        p += 1
    return factors


def _front(step: Step, like: Tensor, generator: torch.Generator) -> nn.Sequential | nn.Module:
    down = downsampler(step["downsample"], step["r"])
    if step["mode"] == "keep":
        return down
    layers, width = nn.Sequential(), step["channels"]
    factors = _factors(step["r"])
    for number, factor in enumerate(factors):
        last = number == len(factors) - 1
        if step["mode"] == "stages":
            out = step["out"] if last else step["filters"]
            conv = _stage(width, out, factor, like, generator)
            _set_cell(conv, step["channels"], _cell(step["downsample"], factor))
        else:
            out = step["filters"]
            conv = _stage(width, out, factor, like, generator)
            if step["norm"]:
                layers.append(conv)
                conv = nn.BatchNorm2d(out, dtype=like.dtype, device=like.device)
        layers.append(conv)
        if step["act"] is not None:
            layers.append(_activation(step, out).to(like.device, like.dtype))
        width = out
    if step["mode"] == "stages":
        return layers
    end = _new_conv(like, width, step["channels"], 1)
    _randomize(end, generator)
    return ResidualFront(down, layers.append(end), step["channels"], like)


def _activation(step: Step, width: int) -> nn.Module:
    phi = activation(step["act"])
    if step["mode"] == "residual":
        return phi
    pact = PAct(phi, width)
    with torch.no_grad():
        pact.a[step["channels"] :] = 1  # the new filters change nothing yet: they may be non-linear from the start
    return pact


def _stage(inputs: int, out: int, factor: int, like: Tensor, generator: torch.Generator) -> nn.Conv2d:
    """A convolution that shrinks by a prime: 3x3/2 for two, otherwise a kernel as large as the stride."""
    conv = _new_conv(like, inputs, out, 3, 2, 1) if factor == 2 else _new_conv(like, inputs, out, factor, factor)
    _randomize(conv, generator)
    return conv


def _randomize(conv: nn.Conv2d, generator: torch.Generator) -> None:
    """He initialisation from a generator of its own."""
    weight = conv.weight
    std = (2 / weight[0].numel()) ** 0.5
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * std)
        assert conv.bias is not None
        conv.bias.zero_()


def _set_cell(conv: nn.Conv2d, channels: int, cell: Tensor) -> None:
    """The first `channels` filters shrink one channel each and read nothing else."""
    with torch.no_grad():
        conv.weight[:channels] = 0
        offset = conv.kernel_size[0] - len(cell)  # 3x3/2 with padding 1: its taps [1:, 1:] never read the padding
        for c in range(channels):
            conv.weight[c, c, offset:, offset:] = torch.outer(cell, cell).to(conv.weight)


def _add_zero_columns(conv: nn.Conv2d, count: int) -> None:
    """Let a convolution read `count` more channels, with weight zero."""
    weight = conv.weight.detach()
    zeros = weight.new_zeros(weight.shape[0], count, *weight.shape[2:])
    conv.weight = nn.Parameter(torch.cat([weight, zeros], 1), requires_grad=conv.weight.requires_grad)
    conv.in_channels += count

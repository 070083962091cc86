"""Networks of folders for prediction and explanation: single ones, and ensembles with mirrored images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..accelerate import Accelerated
from ..datasets.views import MirroredSource
from ..errors import DataError, GigamorphError, from_network
from ..images.affine import Affine, CoordinateMap
from ..images.pixels import PixelSource, to_original
from ..models.classifier import record
from ..models.folder import Preprocessing
from ..models.outputs import Outputs, mean_log_odds, outputs_of, set_outputs
from ..train.explanation import Explanation, Result, SelfExplaining, class_of, explain_class, gradient
from .images import PreparedSource


class Published:
    """An accelerated network that reports an image which the network refuses as an error of one line with its name."""

    def __init__(self, net: Accelerated, name: str) -> None:
        self.__dict__.update(net=net, network_name=name)

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # during a copy or unpickling
            raise AttributeError(name)
        return getattr(self.net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.net, name, value)

    def __call__(self, image: Any) -> Any:
        return self._with_image_name(image, lambda: self.net(image))

    def evidence_map(self, image: Any, score: Any) -> Any:
        """See `Accelerated.evidence_map`."""
        return self._with_image_name(image, lambda: self.net.evidence_map(image, score))

    def _with_image_name(self, image: Any, compute: Callable[[], Any]) -> Any:
        one = image[0] if isinstance(image, list) else image
        name = str(getattr(one, "name", "image"))
        try:
            return compute()
        except DataError as error:  # raised where the image's name is unknown, such as in an encoder of tiles
            raise error if name in str(error) else DataError(f"{name}: {error}") from error
        except Exception as raised:
            if not from_network(raised):
                raise
            shape = tuple(one.shape)[-3:]
            try:
                with torch.no_grad():
                    record(self.net._network, self.network_name, (1, *shape), "cpu")
            except GigamorphError as error:
                raise DataError(f"{name}: {error}") from error
            raise  # the image is not the cause


@dataclass(frozen=True)
class Member:
    """A network of an ensemble with its input and outputs.

    Attributes:
        preprocessing: None if it takes images as they are.
    """

    net: Any
    preprocessing: Preprocessing | None
    outputs: Outputs

    def seen(self, source: PixelSource) -> PixelSource:
        return source if self.preprocessing is None else PreparedSource(source, self.preprocessing)


class Ensemble(SelfExplaining):
    """Several networks, and mirrored images, as one network: log-odds of the mean of their probabilities.

    A call takes an image, with grey values if members prepare it, or a list of one, and returns log-odds (1, names).
    Networks of exams return the concatenated outputs of all members, for `Outputs.together` over an exam's views.

    Args:
        outputs: meaning of the members' log-odds.
        flips: (left-right, up-down) flips of the images that each member gets, including (False, False).
    """

    def __init__(self, members: Sequence[Member], outputs: Outputs, flips: Sequence[tuple[bool, bool]]) -> None:
        self.members, self.flips = list(members), flips
        self._numbers, self._side_by_side = outputs.numbers, outputs.views is not None
        each = tuple(member.outputs for member in self.members) * len(flips)
        own = replace(outputs, members=each) if self._side_by_side else replace(outputs, averaged=True)
        set_outputs(self, own)
        self._on_tile: Any = None

    @property
    def on_tile(self) -> Any:
        """Callback after each tile of each member."""
        return self._on_tile

    @on_tile.setter
    def on_tile(self, call: Any) -> None:
        self._on_tile = call
        for member in self.members:
            member.net.on_tile = call

    def eval(self) -> Ensemble:
        for member in self.members:
            member.net.eval()
        return self

    def __call__(self, image: Any) -> Tensor:
        source = image[0] if isinstance(image, list) else image
        found = [(member, member.net(seen).double()) for member, seen in self._views(source)]
        if self._side_by_side:
            return torch.cat([rows for _, rows in found], 1)
        return self._mean(torch.stack([member.outputs.log_odds(rows) for member, rows in found]))

    def _mean(self, each: Tensor) -> Tensor:
        """Return the mean of numbers, or the log-odds of the mean of probabilities."""
        return each.mean(0) if self._numbers else mean_log_odds(each)

    def explain_class(self, source: PixelSource, which: int | None) -> Result:
        """Sum the members' maps, each weighted by the slope of the mean's log-odds in its own; see `_merge`."""
        return self._explain_with(source, which, lambda net, seen, number: explain_class(net, seen, number)[0])

    def explain_gradient(self, source: PixelSource, which: int | None) -> Result:
        """Return the gradient of the mean's log-odds in the image's grey values; members may resize it differently.

        If members take images as they are, it is the gradient in the image's values.
        """

        def by_grey(net: Any, seen: PixelSource, number: int) -> Explanation:
            found = gradient(net, seen, number)[0].cpu()
            if not isinstance(seen, PreparedSource):
                return Explanation(seen, found, Affine())
            _, std = seen.normalize.per_channel(seen.shape[0])
            scaled = found / torch.tensor(std, dtype=found.dtype)[:, None, None]
            return Explanation(seen, scaled, Affine())

        found, log_odds, number = self._explain_with(source, which, by_grey)
        return replace(found, values=found.values.abs().amax(0), log_odds=None), log_odds, number

    def _explain_with(self, source: PixelSource, which: int | None, explain: Callable[..., Explanation]) -> Result:
        views = list(self._views(source))
        with torch.no_grad():
            rows = [member.net(seen).double() for member, seen in views]
        each = torch.stack([member.outputs.log_odds(own).cpu() for (member, _), own in zip(views, rows, strict=True)])
        mean = self._mean(each)
        given = torch.cat(rows, 1).cpu() if self._side_by_side else mean
        number = class_of(given, which, outputs_of(self))
        log_slopes = _log_slope(each[:, 0, number]) - _log_slope(mean[0, number])
        slopes = (torch.zeros_like(log_slopes) if self._numbers else log_slopes).exp() / len(views)
        maps = [explain(member.net, seen, number) for member, seen in views]
        # The first len(self.members) maps are of images that are not mirrored.
        log_odds = float(mean[0, number])
        return _merge(maps, slopes.tolist(), len(self.members), log_odds), given[0], number

    def _views(self, source: PixelSource) -> Iterator[tuple[Member, PixelSource]]:
        """Yield each member with each of its images; images that are not mirrored come first."""
        for left_right, up_down in sorted(self.flips):
            mirrored = MirroredSource(source, left_right=left_right, up_down=up_down)
            for member in self.members:
                yield member, member.seen(mirrored if left_right or up_down else source)


def _log_slope(log_odds: Tensor) -> Tensor:
    """log p (1 - p): the slope of a probability in its log-odds."""
    return F.logsigmoid(log_odds) + F.logsigmoid(-log_odds)


def _merge(maps: Sequence[Explanation], slopes: Sequence[float], plain: int, log_odds: float) -> Explanation:
    """Return the weighted sum of maps (..., h, w), on the finest grid of a map whose image is not mirrored.

    With z the log-odds of the mean of n probabilities p_i with log-odds z_i, dz / dz_i = p_i (1 - p_i) / (n p (1 - p)):
    this is the share of a location's contribution to z_i in z. Maps on other grids are resampled bilinearly; additive
    maps are also scaled by the ratio of the cells' areas.
    """

    def in_file(one: Explanation) -> CoordinateMap:
        return to_original(one.source) @ one.in_source

    def area(one: Explanation) -> float:
        left, top, right, bottom = in_file(one).boxes([0, 0, *one.values.shape[:-3:-1]]).tolist()
        return (right - left) * (bottom - top) / (one.values.shape[-1] * one.values.shape[-2])

    base = min(maps[:plain], key=area)
    height, width = base.values.shape[-2:]
    to_base, adds_up = in_file(base).inverse(), all(one.adds_up for one in maps)
    total = torch.zeros(base.values.shape, dtype=torch.float64)
    for one, slope in zip(maps, slopes, strict=True):
        to_grid = to_base @ in_file(one)
        _, rows, columns = one.source.shape
        reach = tuple(one.in_source.inverse().boxes([0, 0, columns, rows]).tolist())
        layers = one.values.detach().double().cpu().reshape(-1, *one.values.shape[-2:])
        moved = [torch.from_numpy(to_grid.resample(layer, 0, height, 0, width, reach)) for layer in layers]
        share = area(base) / area(one) if adds_up else 1.0
        total += slope * share * torch.stack(moved).double().reshape(total.shape)
    return replace(base, values=total.float(), log_odds=log_odds, adds_up=adds_up)

"""The programs of a network: recorded, planned and kept by all that they depend on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ... import kernels
from ..capture.arguments import is_bag
from ..capture.program import Given, strides, wants
from ..capture.trace import Program, capture, refuse_backward_hooks
from ..cuda_graphs import buffers
from ..errors import GigamorphError
from ..module.arguments import refuse_wrapped
from ..parallel.processes import check_same, world
from ..planning.plan import Plan
from ..planning.request import Request
from ..planning.search import arrange
from ..planning.together import arrange_together
from ..tiling.memory import return_free_pages
from ..tiling.scan import Autocast
from ..tiling.spatial import SpatialShard, spatial_group
from ..tiling.stage import TiledStage
from .image_batch import ImageBatch
from .prepared import Prepared, ProgramKey

_REMEMBERED = 16  # image sizes whose program and plan are kept
_VARIANTS = 4  # programs of one size, of different states of the network


@dataclass(frozen=True)
class Form:
    """What is computed with a network instead of its call alone.

    Attributes:
        key: tells it from others.
        call: gets the image and further maps.
        inputs: shapes and dtypes of those maps, whose image axes are the last two, and whether they want a gradient.
        vectors: the same of tensors without image axes, which it gets after the maps.
    """

    key: Hashable
    call: Callable[..., Any]
    inputs: tuple[Given, ...] = ()
    vectors: tuple[Given, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What a plan has to keep to, and the processes that share an image; see `accelerate`."""

    memory_budget: int | None
    tile: tuple[int, int] | None
    halos: str
    fallback: str | None
    split: Any

    def plan_for(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        form: Form | None = None,
    ) -> Plan:
        """The plan of an image batch (N, C, H, W), in the gradient mode that is on.

        Args:
            form: what is computed instead of the network's call.
        """
        form = form or Form((), network)
        program = capture(network, shape, dtype, device, form.call, form.inputs, form.vectors, branches=())
        return arrange(program, self.request(torch.is_grad_enabled()), shard=self.shard(program))[1]

    def request(self, training: bool, image_grad: bool = False, count_tile: bool = True) -> Request:
        given = self.memory_budget, self.tile, training, self.halos
        return Request(*given, image_grad, count_tile, self.fallback)

    def shard(self, program: Program) -> SpatialShard | None:
        """The processes that share an image; to a SyncBatchNorm among them they are one."""
        if self.split is None:
            return None
        shard = spatial_group(self.split)
        for op in program.ops:
            if op.group is not None and dist.get_world_size(op.group) != shard.count:
                raise GigamorphError(
                    f"module '{op.module}' shares its statistics with other processes than those that share an image; "
                    "give its process_group and split the same processes"
                )
            op.group = None
        return shard


class Programs:
    """The programs of one network, the latest that were used.

    Attributes:
        kept: by what they were made for; of each several, for states of the network that the key does not tell.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[ProgramKey, list[tuple[Prepared, ...]]] = OrderedDict()

    def __iter__(self) -> Iterator[Prepared]:
        return (one for known in self.kept.values() for together in known for one in together)

    def prepare(
        self,
        network: nn.Module,
        images: Sequence[ImageBatch],
        settings: Settings,
        form: Form | None = None,
        check: Callable[[tuple[int, ...], torch.device], None] | None = None,
        branches: tuple[bool, ...] = (),
    ) -> tuple[Prepared, ...]:
        """The network made ready for image batches: one alone, or several that go through it side by side.

        Args:
            form: what is computed instead of the network's call.
            check: called with the axes between batch and rows, and the device, before the network is recorded.
            branches: those that the image is known to take; see `branches.py`.
        """
        form = form or Form((), network)
        if settings.split is not None:
            _check_alike(network, images[0], settings)
        key = _key(images, settings, form)
        known = self.kept.setdefault(key, [])
        self.kept.move_to_end(key)
        for place, ready in enumerate(known):
            pairs = zip(ready, images, strict=True)
            if _goes(ready, branches) and all(one.staged.program.holds(image.given) for one, image in pairs):
                known.insert(0, known.pop(place))
                return ready
        if key.device.type == "cpu":
            return_free_pages()  # of the last step, which would stay there beside what records and plans take
        refuse_wrapped(network)
        if key.training:
            refuse_backward_hooks(network)
        if check is not None:
            shape = next((bag.shape for bag in images[0].given if is_bag(bag)), images[0].shape)
            check(tuple(shape[1:-2]), key.device)
        programs = [
            capture(
                network,
                *(one.shape, key.dtype, key.device, form.call, form.inputs, form.vectors, wants(one.image)),
                branches=branches,
                strides=strides(one.image),
                given=one.given,
            )
            for one in images
        ]
        for ready in known:  # what a call changes may differ (a counter), and all else be the same
            if all(one.staged.program.take_over(other) for one, other in zip(ready, programs, strict=True)):
                return ready
        known.insert(0, _planned(programs, key, settings))
        del known[_VARIANTS:]
        if len(self.kept) > _REMEMBERED:
            self.kept.popitem(last=False)
        return known[0]

    def keep_captures_of(self, prepared: Sequence[Prepared]) -> None:
        """Forget what has been captured of all others: the plan has room for the tiles of one program."""
        for other in self:
            if all(other is not one for one in prepared):
                other.let_go()


def _goes(together: Sequence[Prepared], branches: tuple[bool, ...]) -> bool:
    """Whether programs follow branches that are known."""
    taken = ([branch.taken for branch in one.staged.program.branches] for one in together)
    return all(tuple(one[: len(branches)]) == branches for one in taken)


def _check_alike(network: nn.Module, image: ImageBatch, settings: Settings) -> None:
    """Refuse what differs among the processes that share an image: they would wait for each other, or be wrong.

    Of each weight and statistic the first value is looked at, which tells another seed or checkpoint.
    """
    weights = [t for t in chain(network.parameters(), network.buffers()) if t.is_floating_point() and t.numel()]
    what = (
        *(tuple(image.shape), image.dtype, image.training, image.image_grad, settings.memory_budget),
        *(torch.is_grad_enabled(), Autocast.current(image.device)),
        *(module.training for module in network.modules()),
        *(parameter.requires_grad for parameter in network.parameters()),
        *(torch.stack([t.detach()[(0,) * t.dim()].double() for t in weights]).tolist() if weights else ()),
    )
    check_same(
        spatial_group(settings.split).group,
        repr(what),
        image.device,
        "processes that share an image have images of different shapes, other settings or modes, or other weights; "
        "give all of them the same (torch.manual_seed before the network is made, one checkpoint)",
    )


def _key(images: Sequence[ImageBatch], settings: Settings, form: Form) -> ProgramKey:
    first = images[0]
    return ProgramKey(
        shapes=tuple(one.shape for one in images),
        dtype=first.dtype,
        device=first.device,
        training=first.training,
        image_grads=tuple(one.image_grad for one in images),
        wanting=tuple(wants(one.image) for one in images),
        strides=tuple(strides(one.image) for one in images),
        modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        autocast=Autocast.current(first.device),
        settings=(settings.tile, settings.memory_budget, settings.halos),
        triton=kernels.enabled(first.device),
        world=world(),
        form=(form.key, form.inputs, form.vectors),
    )


def _planned(programs: Sequence[Program], key: ProgramKey, settings: Settings) -> tuple[Prepared, ...]:
    """Recorded programs with the tiling of each stage."""
    counted = settings.memory_budget is not None or buffers.executor(key.device) is not None
    shard = None if len(programs) > 1 else settings.shard(programs[0])
    if len(programs) > 1:
        arranged = arrange_together(programs, settings.request(key.training, count_tile=counted), key.image_grads)
    else:
        request = settings.request(key.training, key.image_grads[0], counted)
        arranged = [arrange(programs[0], request, shard=shard, agree=True)]
    prepared = []
    for staged, plan in arranged:
        stages = tuple(TiledStage(stage, tile) for stage, tile in zip(staged.stages, plan.sides, strict=True))
        prepared.append(Prepared(staged, stages, plan, shard=shard))
    return tuple(prepared)

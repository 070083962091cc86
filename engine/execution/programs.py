"""The programs of a network: one for each graph, image size and setting, planned and kept."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ... import kernels
from ..capture.graph import Graph
from ..capture.program import Given, Program, strides, wants
from ..cuda_graphs import buffers
from ..errors import GigamorphError
from ..parallel.processes import check_same, world
from ..planning.multi_size import arrange_together
from ..planning.request import Request
from ..planning.search import arrange
from ..tiling.memory import return_free_pages
from ..tiling.scan import Autocast
from ..tiling.spatial import SpatialShard, spatial_group
from ..tiling.stage import TiledStage
from .image_batch import ImageBatch
from .prepared import Prepared, ProgramKey

_REMEMBERED = 16  # programs of one graph that are kept: image sizes, budgets


@dataclass(frozen=True)
class Settings:
    """What a plan has to keep to, and the processes that share an image; see `accelerate`."""

    memory_budget: int | None
    tile: tuple[int, int] | None
    halos: str
    fallback: str | None
    split: Any

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


@dataclass(frozen=True)
class Inputs:
    """The inputs of a graph in one call.

    Attributes:
        flat: tensors and Python values, one for each of the graph's sources.
        roles: by place "image", "map" or "vector"; other tensors are the network's state.
        image: the batch.
    """

    flat: Sequence[Any]
    roles: Mapping[int, str]
    image: ImageBatch

    def key(self, counters: Collection[int]) -> tuple[Any, ...]:
        """What a program depends on besides the graph and the network's state, at which the graph's guards look.

        Args:
            counters: inputs on which it does not depend.
        """
        return tuple(
            (Given.of(value), self.roles.get(place))
            if isinstance(value, Tensor) and place in self.roles
            else (type(value), value)
            for place, value in enumerate(self.flat)
            if place in self.roles or not (isinstance(value, Tensor) or place in counters)
        )


class Programs:
    """The programs of one network, by graph and by what they were made for."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[Graph, OrderedDict[Any, tuple[Prepared, ...]]]
        self.kept = weakref.WeakKeyDictionary()
        self.logged: weakref.WeakSet[Graph] = weakref.WeakSet()  # graphs whose early end is in the log

    def __reduce__(self) -> Any:
        return Programs, ()  # they are made again in a moment

    def __iter__(self) -> Iterator[Prepared]:
        return (one for known in self.kept.values() for together in known.values() for one in together)

    def prepare(self, graphs: Sequence[Graph], given: Sequence[Inputs], settings: Settings) -> tuple[Prepared, ...]:
        """Graphs made ready for image batches: one alone, or several that go through the network side by side."""
        known = self.kept.setdefault(graphs[0], OrderedDict())
        images = [one.image for one in given]
        key = (
            _key(images, settings),
            tuple(one.key(graph.counters) for graph, one in zip(graphs, given, strict=True)),
            tuple(graphs[1:]),
        )
        ready = known.get(key, ())
        holds = bool(ready) and all(p.staged.program.holds(each.flat) for p, each in zip(ready, given, strict=True))
        if settings.split is not None:  # if one has recorded again, all plan: they wait for each other there
            holds = spatial_group(settings.split).all_agree(holds, images[0].device)
        if holds:
            known.move_to_end(key)
            return ready
        if images[0].device.type == "cpu":
            return_free_pages()  # of the last step, which would stay there beside what records and plans take
        programs = [
            graph.program(
                one.flat,
                Given(one.image.shape, one.image.dtype, wants(one.image.image), strides(one.image.image)),
                one.roles,
                one.image.device,
            )
            for graph, one in zip(graphs, given, strict=True)
        ]
        known[key] = _planned(programs, key[0], settings)
        if len(known) > _REMEMBERED:
            known.popitem(last=False)
        return known[key]

    def keep_captures_of(self, prepared: Sequence[Prepared]) -> None:
        """Forget what has been captured of all others: the plan has room for the tiles of one program."""
        for other in self:
            if all(other is not one for one in prepared):
                other.let_go()


def check_alike(network: nn.Module, image: ImageBatch, settings: Settings) -> None:
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


def _key(images: Sequence[ImageBatch], settings: Settings) -> ProgramKey:
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
        settings=(settings.tile, settings.memory_budget, settings.halos, settings.fallback),
        triton=kernels.enabled(first.device),
        world=world(),
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

"""A cache of a network's planned programs: one per graph, image size and settings."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

_REMEMBERED = 16  # cached programs per graph, for image sizes and budgets


@dataclass(frozen=True)
class PlanSettings:
    """The constraints of plans, and the processes that share an image; see `accelerate`."""

    memory_budget: int | None
    tile: tuple[int, int] | None
    halos: str
    fallback: str | None
    split: Any

    def request(self, training: bool, image_grad: bool = False, count_tile: bool = True) -> Request:
        given = self.memory_budget, self.tile, training, self.halos
        return Request(*given, image_grad, count_tile, self.fallback)

    def shard(self, program: Program) -> SpatialShard | None:
        """The processes that share an image; a SyncBatchNorm treats them as one process."""
        if self.split is None:
            return None
        shard = spatial_group(self.split)
        for op in program.ops:
            if op.group is not None and dist.get_world_size(op.group) != shard.count:
                raise GigamorphError(
                    f"module '{op.module}' shares its statistics with other processes than those that share an image; "
                    "pass the same processes to its process_group and to split"
                )
            op.group = None
        return shard


@dataclass(frozen=True)
class GraphInputs:
    """The inputs of a graph in one call.

    Attributes:
        flat: tensors and Python values, one per source of the graph.
        roles: "image", "map" or "vector" by index; other tensors are the network's state.
        image: the image batch.
    """

    flat: Sequence[Any]
    roles: Mapping[int, str]
    image: ImageBatch

    def key(self, counters: Collection[int]) -> tuple[Any, ...]:
        """The part of the cache key for these inputs; the graph's guards check the network's state.

        Args:
            counters: inputs on which the program does not depend.
        """
        return tuple(
            (Given.of(value), self.roles.get(place))
            if isinstance(value, Tensor) and place in self.roles
            else (type(value), value)
            for place, value in enumerate(self.flat)
            if place in self.roles or not (isinstance(value, Tensor) or place in counters)
        )


class Programs:
    """The programs of one network, by graph and key."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[Graph, OrderedDict[Any, tuple[Prepared, ...]]]
        self.kept = weakref.WeakKeyDictionary()
        self.logged: weakref.WeakSet[Graph] = weakref.WeakSet()  # graphs whose early end was logged

    def __reduce__(self) -> Any:
        return Programs, ()  # programs are not pickled, but planned again

    def __iter__(self) -> Iterator[Prepared]:
        return (one for known in self.kept.values() for together in known.values() for one in together)

    def prepare(
        self, graphs: Sequence[Graph], given: Sequence[GraphInputs], settings: PlanSettings
    ) -> tuple[Prepared, ...]:
        """The programs of graphs for image batches: a single one, or several that run the steps together."""
        known = self.kept.setdefault(graphs[0], OrderedDict())
        images = [one.image for one in given]
        key = (
            _key(images, settings),
            tuple(one.key(graph.counters) for graph, one in zip(graphs, given, strict=True)),
            tuple(graphs[1:]),
        )
        ready = known.get(key, ())
        holds = bool(ready) and all(p.staged.program.holds(each.flat) for p, each in zip(ready, given, strict=True))
        if settings.split is not None:  # planning is a collective: if one process records again, all plan
            holds = spatial_group(settings.split).all_agree(holds, images[0].device)
        if holds:
            known.move_to_end(key)
            return ready
        if images[0].device.type == "cpu":
            return_free_pages()  # those of the last step would add to the memory of recording and planning
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
        """Free the captures of all other programs, because the plan includes the captures of one program only."""
        for other in self:
            if all(other is not one for one in prepared):
                other.free_captures()


def check_alike(network: nn.Module, image: ImageBatch, settings: PlanSettings) -> None:
    """Raise an error if the processes that share an image differ, because they would deadlock or compute wrong results.

    The first value of each weight and statistic is compared, which detects another seed or checkpoint.
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
        "use the same in all (call torch.manual_seed before creating the network, or load one checkpoint)",
    )


def _key(images: Sequence[ImageBatch], settings: PlanSettings) -> ProgramKey:
    first = images[0]
    return ProgramKey(
        shapes=tuple(one.shape for one in images),
        dtype=first.dtype,
        device=first.device,
        training=first.training,
        image_grads=tuple(one.image_grad for one in images),
        wanting=tuple(wants(one.image) for one in images),
        strides=tuple(strides(one.image) for one in images),
        in_memory=all(one.in_memory for one in images),
        modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        autocast=Autocast.current(first.device),
        settings=(settings.tile, settings.memory_budget, settings.halos, settings.fallback),
        triton=kernels.enabled(first.device),
        world=world(),
    )


def _planned(programs: Sequence[Program], key: ProgramKey, settings: PlanSettings) -> tuple[Prepared, ...]:
    """Plan recorded programs, with the tiling of each stage."""
    counted = settings.memory_budget is not None or buffers.executor(key.device) is not None
    shard = None if len(programs) > 1 else settings.shard(programs[0])
    if len(programs) > 1:
        arranged = arrange_together(programs, settings.request(key.training, count_tile=counted), key.image_grads)
    else:
        request = replace(settings.request(key.training, key.image_grads[0], counted), in_memory=key.in_memory)
        arranged = [arrange(programs[0], request, shard=shard, agree=True)]
    prepared = []
    for staged, plan in arranged:
        stages = tuple(TiledStage(stage, tile) for stage, tile in zip(staged.stages, plan.sides, strict=True))
        prepared.append(Prepared(staged, stages, plan, shard=shard))
    return tuple(prepared)

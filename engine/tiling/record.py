"""Runs a tile op by op: without autograd in pass 1, and recorded with autograd for differentiation in pass 2."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .halos import HaloStore, HandOn, Rect, cut
from .reduce import Accumulator, Consumer, Consumers
from .saved_tensors import SavedTensors
from .scan import Scan
from .tile import Autograd, Halos, Returned, Tile

Read = Callable[[int, Rect], Tensor]
Publish = Callable[[Tile, int, Tensor], Tensor | None]
Collect = Callable[[Tile, int, Tensor], None]
Grad = Callable[["Recorded", Consumers], Tensor | None]  # gets the tile as an argument: a reference would form a cycle
WindowGrads = list[tuple[tuple[int, Rect], Tensor]]  # ((source, rectangle), gradient)


@dataclass
class PassState:
    """The state that pass 1 stores for pass 2.

    Attributes:
        store: storage of the halos.
        seed: seed of the tiles' random numbers.
        vectors: the prepared vectors by value number, which the graphs of recorded tiles refer to.
        leaves: the vectors that require a gradient.
        sources: the sources that require a gradient.
        needs: the maps that a gradient flows through.
        accumulators: the stage's reductions.
        above: per strip, handles of the halo rows that enter it, in full width, by value number.
        left: per tile, handles of the halo columns that enter it, by value number.
        recorded: tiles whose graphs are retained and need no recomputation.
        sums: gradients of the vectors, summed over the tiles.
        drawn: per tile, a checksum of the random numbers that pass 1 drew.
    """

    store: HaloStore
    seed: int
    vectors: dict[int, Tensor]
    leaves: list[int]
    sources: set[int]
    needs: set[int]
    accumulators: list[Accumulator]
    above: list[dict[int, object]] = field(default_factory=list)
    left: dict[tuple[int, int], dict[int, object]] = field(default_factory=dict)
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    drawn: dict[tuple[int, int], int] = field(default_factory=dict)

    def sum_of(self, value: int, dtype: torch.dtype, summand: Tensor | None = None) -> Tensor:
        """The sum of a vector's gradient, to which `summand` is added; a new sum starts from zero."""
        if value in self.sums:
            return self.sums[value] if summand is None else self.sums[value].add_(summand)
        like = self.vectors[value]
        self.sums[value] = (
            torch.zeros_like(like, dtype=dtype) if summand is None else summand.to(dtype).reshape(like.shape)
        )
        return self.sums[value]


def run_tile(
    scan: Scan, tile: Tile, publish: Publish, only: set[int] | None = None, collect: Collect | None = None
) -> None:
    """Compute a tile op by op, dropping each block after its last reader.

    Args:
        publish: called with every computed block; may return a tensor that replaces it.
        only: the outputs to compute; None for all.
        collect: called with the blocks of maps whose gradients an op gathers, as that op returned them.
    """
    tiled = scan.tiled
    for source in tiled.stage.sources:
        if source in scan.taken:
            rect = tiled.block(source, tile.i, tile.j)
            publish(tile, source, tile.window(source, rect, (0, 0, 0, 0), None)[0])
    reads_left = dict(tiled.reads_left)
    watch = scan.watch
    for local in tiled.stage.locals:
        outputs = local.op.outputs
        if tiled.computes(outputs[0], tile.i, tile.j) and (only is None or any(v in only for v in outputs)):
            if watch is not None:
                watch(tiled.new_bytes(local, tile.i, tile.j))
            blocks = tile.run(local)
            if local.gathers is not None:
                if reads_left[local.gathers.value] > 1:
                    tile.blocks[local.gathers.value] = blocks[-1]
                if collect is not None:
                    collect(tile, local.gathers.value, blocks[-1])
            for value, block in zip(outputs, blocks, strict=local.gathers is None):
                replaced = publish(tile, value, block)
                if reads_left.get(value):
                    tile.blocks[value] = block if replaced is None else replaced
        for value in local.reads:
            reads_left[value] -= 1
            if not reads_left[value]:
                tile.blocks.pop(value, None)


def consumers_of(scan: Scan, kept: PassState, grads: Sequence[Tensor | None] | None = None) -> Consumers:
    """The consumers of each map (reductions and stored maps), in pass 2 with their gradients."""
    stage = scan.tiled.stage
    consumers: Consumers = {}
    left = list(grads) if grads is not None else [None] * len(stage.results)
    for accumulator in kept.accumulators:
        reduction = accumulator.reduction
        own = tuple(left.pop(0) for _ in reduction.outputs)
        shares = accumulator.shares() if accumulator.has_shares and own[0] is not None else {}
        if reduction.kind != "moments":
            own = tuple(None if grad is None else reduction.keep_dims(grad) / reduction.count for grad in own)
        consumers.setdefault(reduction.value, []).append(Consumer(accumulator, own, shares))
    for value, grad in zip(stage.stored, left, strict=True):
        consumers.setdefault(value, []).append(Consumer(None, (grad,), {}))
    return consumers


def has_grad(consumer: Consumer) -> bool:
    return any(grad is not None for grad in consumer.grads)


class _Watch:
    """A gradient hook that checks the memory limit; it must not refer to the graph that it is registered on."""

    def __init__(self, watch: Callable[[int | None], None]):
        self.watch = watch

    def __call__(self, _grad: Tensor) -> None:
        self.watch(None)


class Recorded:
    """A tile computed with autograd on: the roots to differentiate, and functions that return their gradients.

    Args:
        scan: the scan of the stage.
        kept: the state of pass 1.
        place: row and column of the tile.
        halos: the halos that enter the tile.
        read: returns the pixels of a rectangle of a source.
        consumers: the consumers of the tile's maps; in pass 2 with gradients, and those without are not computed.
        keep: in pass 1, called with every block; None in pass 2.
        stored: in pass 2, maps that pass 1 stored and that are read again, by value number.
        alone: whether `stored` and the gradients of stored maps are this tile's blocks instead of whole maps.
    """

    def __init__(
        self,
        scan: Scan,
        kept: PassState,
        place: tuple[int, int],
        halos: Halos,
        read: Read,
        consumers: Consumers,
        keep: Publish | None = None,
        stored: Mapping[int, Tensor] | None = None,
        alone: bool = False,
    ):
        self.scan, self.keep, self.stored, self.alone = scan, keep, stored or {}, alone
        self.roots: list[GradientEdge] = []  # not tensors, whose values may be unused
        self.grads: list[Grad] = []

        sources, holder = kept.sources, weakref.ref(kept)  # weak: it refers to this graph

        def pixels(source: int, rect: Rect) -> Tensor:
            window = read(source, rect)
            return window.detach().requires_grad_() if source in sources else window

        def sum_of(value: int, dtype: torch.dtype, summand: Tensor | None = None) -> Tensor:
            held = holder()
            assert held is not None
            return held.sum_of(value, dtype, summand)

        anchor = torch.empty((), device=scan.device, requires_grad=True)  # its value is unused
        autograd = Autograd(kept.needs, anchor, sum_of, SavedTensors())
        given = pixels, kept.vectors, halos, autograd
        self.tile = Tile(scan.tiled, *place, *given, second_pass=keep is None, whole=scan.whole)
        wanted = consumers if keep is not None else {v for v, taken in consumers.items() if any(map(has_grad, taken))}
        reached, through = self.tile.reach(wanted)
        publish, collect = partial(self._publish, consumers, through), partial(self._take, consumers)
        with torch.enable_grad(), autograd.saved.record():
            run_tile(scan, self.tile, publish, None if keep is not None else reached, collect)
        self.tile.blocks.clear()
        self.keep = None  # its results would form a reference cycle through autograd's nodes

    def _publish(self, consumers: Consumers, through: set[int], tile: Tile, value: int, block: Tensor) -> Tensor | None:
        """Note a block as a root if needed; a block that later tiles read also receives their gradients."""
        if self.keep is not None:
            self.keep(tile, value, block)
        if value not in tile.needs or not block.requires_grad:
            return None
        if self.scan.watch is not None:
            block.register_hook(_Watch(self.scan.watch))  # runs just before its op's backward
        result = None
        if value in tile.tiled.with_halo and tile.hands_on(value):
            gather = tile.tiled.gathered.get(value)
            sloped = None if gather is None or gather.slope is None else block.detach()
            if value in through:
                add = partial(tile.add_handed_back, value, sloped)
                block = result = HandOn.apply(tile.anchor, block, add, value in tile.tiled.unshared_gradients)  # pyright: ignore
            else:
                alone = partial(_handed_back_alone, tile=tile, value=value, block=block.detach(), sloped=sloped)
                self._add(block, alone)
        if value not in tile.tiled.gathered:
            self._take(consumers, tile, value, block)
        return result

    def _take(self, consumers: Consumers, tile: Tile, value: int, block: Tensor) -> None:
        """Note the roots for the consumers of a block."""
        if value not in tile.needs or not block.requires_grad:
            return
        taken = consumers.get(value, ())
        whole = [number for number, consumer in enumerate(taken) if consumer.of_block or consumer.is_sum]
        if whole:
            moments = any(taken[number].of_moments for number in whole)
            # Except for moments, only its shape is needed, so its memory may be freed.
            asked = block.detach() if moments else block.new_empty(()).expand(block.shape)
            self._add(block, partial(Recorded._block_grad, value=value, numbers=whole, block=asked))
        for number, consumer in enumerate(taken):
            if number not in whole:
                assert consumer.accumulator is not None
                root = consumer.accumulator.partial(block, tile.tiled.block(value, tile.i, tile.j))
                self._add(root, partial(Recorded._partial_grad, value=value, number=number, root=root.detach()))

    def _add(self, root: Tensor, grad: Grad) -> None:
        self.roots.append(get_gradient_edge(root))
        self.grads.append(grad)

    def _rect(self, value: int) -> Rect | None:
        """The rectangle of the tile's block in the map; None if only the block exists."""
        return None if self.alone else self.tile.tiled.block(value, self.tile.i, self.tile.j)

    def _partial_grad(self, consumers: Consumers, value: int, number: int, root: Tensor) -> Tensor | None:
        """The gradient of the tile's share of a sum or maximum."""
        consumer = consumers[value][number]
        grad = consumer.grads[0]
        if grad is None:
            return None
        assert consumer.accumulator is not None
        grad = consumer.accumulator.part_of(grad, self._rect(value))
        if consumer.accumulator.reduction.kind == "max" and consumer.shares:
            grad = grad * consumer.shares[self.tile.i, self.tile.j]
        return grad.to(root.dtype).expand_as(root)

    def _block_grad(self, consumers: Consumers, value: int, numbers: list[int], block: Tensor) -> Tensor | None:
        """The gradient of a block that is stored or that a sum or moments read; moments need the block's values."""
        total: Tensor | None = None
        taken = [consumers[value][number] for number in numbers]
        # The map itself first, then sums, because moments add to an existing gradient.
        for consumer in sorted(taken, key=lambda c: (c.accumulator is not None) + c.of_moments):
            if not has_grad(consumer):
                continue
            if consumer.accumulator is None:
                (grad,) = consumer.grads
                assert grad is not None
                total = self._own(value, grad)
            elif consumer.is_sum:
                (grad,) = consumer.grads
                assert grad is not None
                total = self._with_sum(value, block, total, grad)
            else:
                valued = not self.tile.second_pass or value not in self.tile.tiled.unvalued
                x = block if valued else self._own(value, self.stored[value])
                total = consumer.accumulator.gradient(x, consumer.grads, total, self._rect(value))
        return total

    def _with_sum(self, value: int, block: Tensor, total: Tensor | None, grad: Tensor) -> Tensor:
        """A block's gradient plus that of a sum over its pixels, unless the op that made the block adds it."""
        lacking = None if value in self.tile.tiled.gathered else self.tile.lacking.get(value)
        if total is not None and lacking is not None and grad.shape == (1, block.shape[1], 1, 1):
            lacking.append(grad.flatten())
            return total
        spread = grad.to(block.dtype).expand_as(block)
        return spread if total is None else total + spread

    def _own(self, value: int, stored: Tensor) -> Tensor:
        """The tile's part of a stored map or of its gradient, on the device."""
        rect = self._rect(value)
        if rect is None:
            return stored
        return cut(stored, self.tile.tiled.axes(value), rect).to(self.scan.device, non_blocking=True)

    def differentiate(self, consumers: Consumers, kept: PassState, returned: Returned) -> WindowGrads:
        """Add the tile's gradients to the sums and to the halos' gradients; returns those of source windows."""
        tile = self.tile
        tile.returned = returned
        pairs = [(root, grad(self, consumers)) for root, grad in zip(self.roots, self.grads, strict=True)]
        pairs = [(root, grad) for root, grad in pairs if grad is not None]
        self.roots.clear()
        self.grads.clear()
        if not pairs:
            return []
        windows = [(place, t) for place, t in tile.source_windows.items() if t.requires_grad]
        inputs = [kept.vectors[v] for v in kept.leaves] + [t for _, t in windows]
        assert tile.anchor is not None
        inputs.append(tile.anchor)
        roots, root_grads = zip(*pairs, strict=True)
        del pairs
        result = list(torch.autograd.grad(roots, inputs, root_grads, allow_unused=True))
        for value in kept.leaves:
            grad = result.pop(0)
            if grad is not None:
                _accumulate(kept.sums, value, grad)
        return [(place, grad) for (place, _), grad in zip(windows, result, strict=False) if grad is not None]


def _handed_back_alone(
    _recorded: Recorded, _consumers: Consumers, tile: Tile, value: int, block: Tensor, sloped: Tensor | None
) -> Tensor:
    """The gradient of a block that nothing in its own tile reads."""
    grad = torch.zeros_like(block)
    tile.add_handed_back(value, sloped, grad)
    return grad


def _accumulate(sums: dict[int, Tensor], value: int, grad: Tensor) -> None:
    """Add a tile's parameter gradient to its sum; 16-bit gradients are summed in float32."""
    if value in sums:
        sums[value].add_(grad)
    elif grad.dtype in (torch.float16, torch.bfloat16):
        sums[value] = grad.float()
    else:
        sums[value] = grad.clone()  # autograd may pass the same tensor to another parameter

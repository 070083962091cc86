"""Runs calls of a network: computes the graphs that TorchDynamo records, tile by tile."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.arguments import Arguments
from ..capture.call_trees import tree_leaves
from ..capture.dynamo import Compiled
from ..capture.graph import Graph
from ..capture.program import Program
from ..errors import UnsupportedError
from ..module.first_order import refuse_checkpoint
from ..tiling.memory import format_bytes
from ..tiling.memory_limit import MemoryLimit
from ..tiling.pages import trim_arena
from ..tiling.scan import TileEvent
from .forward import Forward
from .image_batch import ImageBatch, ImageTensor
from .image_sizes import check_rows
from .new_forwards import begin
from .prepared import Prepared
from .programs import GraphInputs, PlanSettings, Programs
from .run import compute

log = logging.getLogger(__name__)


@dataclass
class Call:
    """A call of a network, while its graphs are computed.

    Attributes:
        args, kwargs: the arguments of the recorded function.
        roles, regions: see `Arguments`.
        batch: the image batch.
        further: the other tensors of the call.
        finish: runs a new forward and returns the outputs of its graph.
        complete: returns the outputs for graphs and their inputs; replaces `finish`.
        together: the memory limit of earlier calls, which this call shares.
        like: a program whose output rows must have the same shapes.
        pieces: whether the call may consist of several graphs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: dict[int, str]
    regions: dict[int, Any]
    batch: ImageBatch
    further: list[Tensor]
    finish: Callable[[Forward], Sequence[Any]] = compute
    complete: Callable[[Sequence[Graph], Sequence[GraphInputs]], Sequence[Any]] | None = None
    together: MemoryLimit | None = None
    like: Program | None = None
    pieces: bool = False

    @classmethod
    def of(cls, network: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], batch: Any = None) -> Call:
        """A call with these arguments, in the current gradient mode.

        Args:
            network: the network.
            args, kwargs: the arguments.
            batch: which argument is the image; None selects the first possible one.

        Raises:
            GigamorphError: if no argument is an image.
        """
        first = next(network.parameters(), torch.empty(0))
        given = Arguments.of(args, kwargs, first.device, first.dtype, batch)
        batch = ImageBatch.of(network, given.image, given.further, not given.regions)
        return cls(given.args, given.kwargs, given.roles, given.regions, batch, given.further)


class ProgramKnown(Exception):
    """Aborts a call as soon as its program is known.

    Attributes:
        graph, inputs: the graph of the call, and its inputs.
        prepared: its prepared program.
    """

    def __init__(self, graph: Graph, inputs: GraphInputs, prepared: Prepared):
        super().__init__("the program is known")
        self.graph, self.inputs, self.prepared = graph, inputs, prepared

    @property
    def program(self) -> Program:
        return self.prepared.staged.program


class Runner:
    """Computes the graphs of one network; holds its programs, free pages and recordings between calls.

    Attributes:
        settings: the constraints of plans.
        on_tile: called after each tile.
    """

    def __init__(self, settings: PlanSettings, on_tile: Callable[[TileEvent], None] | None = None):
        self.settings, self.on_tile = settings, on_tile
        self.programs = Programs()
        weakref.finalize(self, trim_arena).atexit = False
        self._compiled: dict[Any, Compiled] = {}
        self._call: Call | None = None

    def compute(self, function: FunctionType, call: Call, *args: Any) -> Any:
        """Call a function, computing its graphs by tiles; returns its result.

        Args:
            function: a module-level Python function, called with `args` and the arguments of `call`.
            call: the arguments, and how its graph is computed.

        Raises:
            UnsupportedError: if the function cannot be recorded or computed.
        """
        # Code between the pieces of a broken graph would read the values of tensors without memory.
        pieces = self.settings.fallback == "untiled" and call.batch.in_memory and call.complete is None
        key = function, pieces
        if key not in self._compiled:
            self._compiled[key] = Compiled(function, self.serve, pieces)
        call.pieces, before, self._call = pieces, self._call, call
        try:
            return self._compiled[key](*args, *call.args, **call.kwargs)
        finally:
            self._call = before

    def open(self, function: FunctionType, call: Call, *args: Any) -> ProgramKnown:
        """The graph and the program of a call, without running it."""

        def found(graphs: Sequence[Graph], inputs: Sequence[GraphInputs]) -> list[Any]:
            raise ProgramKnown(graphs[0], inputs[0], self.programs.prepare(graphs, inputs, self.settings)[0])

        call.complete = found
        try:
            self.compute(function, call, *args)
        except ProgramKnown as opened:
            return opened
        raise UnsupportedError("the forward computes nothing from its image; use the image in it")

    def serve(self, graph: Graph, flat: Sequence[Any]) -> Sequence[Any]:
        """The outputs of a graph for inputs `flat`."""
        outputs, counted = list(self._outputs(graph, flat)), graph.counted(flat)
        if graph.piece and graph not in self.programs.logged:
            self.programs.logged.add(graph)
            size = format_bytes(sum(one.nbytes for one in outputs if isinstance(one, Tensor)))
            log.info("a piece of the forward ends (%s); %s of tensors are stored for the next", graph.piece, size)
        return [counted.get(place, output) for place, output in enumerate(outputs)] if counted else outputs

    def _outputs(self, graph: Graph, flat: Sequence[Any]) -> Sequence[Any]:
        call = self._call
        roles = {} if call is None else self._roles(call, flat)
        if call is None or (call.pieces and "image" not in roles.values()):
            return self._serve_alone(graph, flat)
        inputs = GraphInputs(flat, roles, call.batch)
        if call.complete is not None:
            return call.complete([graph], [inputs])
        prepared = self.programs.prepare([graph], [inputs], self.settings)
        if call.like is not None:
            check_rows(prepared[0].staged.program, call.like)
        (forward,) = self.begin(call, [inputs], prepared)
        call.together = forward.memory_limit
        return call.finish(forward)

    def begin(self, call: Call, inputs: Sequence[GraphInputs], prepared: Sequence[Prepared]) -> list[Forward]:
        """Create a forward for each image batch from the current parameters and buffers."""
        if prepared[0].staged.program.updates:
            refuse_checkpoint()
        self.programs.keep_captures_of(prepared)
        regions = {place: call.regions[id(v)] for place, v in enumerate(inputs[0].flat) if id(v) in call.regions}
        return begin(inputs, prepared, self.on_tile, regions, call.together)

    @staticmethod
    def _roles(call: Call, flat: Sequence[Any]) -> dict[int, str]:
        return {place: call.roles[id(value)] for place, value in enumerate(flat) if id(value) in call.roles}

    def _serve_alone(self, graph: Graph, flat: Sequence[Any]) -> Sequence[Any]:
        """The outputs of a graph without a known call: its largest map is taken as the image."""
        given = {n: t for n, t in enumerate(flat) if isinstance(t, Tensor) and not graph.sources[n].state}
        maps = [n for n, t in given.items() if t.dim() == 4 and t.is_floating_point() and t.numel()]
        if not maps:
            return tree_leaves(graph.run(flat))
        place = max(maps, key=lambda n: given[n].shape[-2] * given[n].shape[-1])
        image = given[place]
        roles = {
            n: "image" if n == place else "map" if t.dim() >= 3 and t.shape[-2:] == image.shape[-2:] else "vector"
            for n, t in given.items()
        }
        image_grad = torch.is_grad_enabled() and image.requires_grad
        training = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in flat)
        batch = ImageBatch(ImageTensor(image), image, image.dtype, image.device, training, image_grad, (image,))
        inputs = GraphInputs(flat, roles, batch)
        prepared = self.programs.prepare([graph], [inputs], self.settings)
        (forward,) = self.begin(Call((), {}, {}, {}, batch, []), [inputs], prepared)
        return compute(forward)

"""The plan of a step: its tiling, the storage of halos and maps, and the predicted memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiling.memory import format_bytes
from .strategy import PLACES


@dataclass(frozen=True)
class Choice:
    """One choice of stored maps.

    Attributes:
        name: description for the printed plan.
        forwards: its work in forwards of stock PyTorch.
        bytes: its bytes of whole maps.
    """

    name: str
    forwards: float
    bytes: int


@dataclass(frozen=True)
class AtPeak:
    """Bytes at the moment of the peak: whole maps, resident strips, the current tile, and graphs of retained tiles."""

    maps: int
    strips: int
    tile: int
    graphs: int


@dataclass(frozen=True)
class Plan:
    """How a step of one image size is computed, and its predicted memory; all sizes are in bytes.

    Attributes:
        image: (N, C, H, W).
        tile: (height, width) of a tile in image pixels.
        tiles: (rows, columns) of tiles.
        training: whether the step has a backward.
        halos: storage of the halos: "device", "host" or "disk".
        retained: number of tiles whose graph is retained from pass 1, so that they are not recomputed.
        parameter_bytes: parameters, the stage's copies of them, and existing gradients, to which the step adds. New
            gradients are not all allocated at the peak.
        halo_bytes: halos stored between the passes, on any device.
        strip_bytes: halos of the resident strips and their gradients, on the device.
        tile_bytes: peak of one tile.
        retained_bytes: bytes that graphs of retained tiles add to the peak.
        retained_tiles: number of final tiles that each stage retains; empty if none.
        stored_bytes: whole maps, their gradients, and the ops after them.
        library_bytes: compiled kernels and copies of weights on the CPU; on a GPU workspaces and trials of kernels.
        heap_bytes: freed blocks that the process retains, on the CPU.
        sides: the (height, width) of each stage's tiles, in pixels of its largest source.
        record_bytes: memory of the recorded network and of planning, on the CPU.
        maps: storage of maps that only stages read: "device", "host" or "disk".
        away_bytes: bytes of these maps if they are not on the device.
        choices: the choices of stored maps (`strategy.py`) that were tried: those that did not fit, and the selected.
        choice: index of the selected choice.
        replay_bytes: additional bytes of replayed tiles (`replay.py`); 0 if tiles are not replayed.
        capture_bytes: additional bytes if the whole step is captured as one graph (`graph_memory.py`), else 0. Steps
            that cannot be captured, for example with hooks on parameters, replay tiles if that fits.
        keeps_graphs: whether the captured step stores the graphs of all tiles, which are then not recomputed.
        op_by_op: whether a GPU waits for the host at each op of each tile, because nothing is captured.
        apart_bytes: bytes by which the peak is smaller than the sum of the largest whole maps, strips and tile of all
            stages, which are never resident together.
        at_peak: bytes of maps, strips, tile and graphs at the peak; None for one of several images.
        budget: the budget, or None.
        stock_bytes: the tensors of the same step in stock PyTorch, or None if not requested. Its libraries are not
            counted: on the CPU ResNet-18's step takes 1.3 times as much, lesionnet's 2.4.
        folded_bytes: the same with frozen norms folded into the convolutions before them.
        untiled_bytes: predicted peak if the step runs PyTorch's own ops on the whole image instead of tiles, else 0.
    """

    image: tuple[int, int, int, int]
    tile: tuple[int, int]
    tiles: tuple[int, int]
    training: bool
    halos: str
    retained: int
    parameter_bytes: int
    halo_bytes: int
    strip_bytes: int
    tile_bytes: int
    retained_bytes: int
    stored_bytes: int
    library_bytes: int
    heap_bytes: int
    sides: tuple[tuple[int, int], ...]
    retained_tiles: tuple[int, ...] = ()
    record_bytes: int = 0
    maps: str = "device"
    away_bytes: int = 0
    choices: tuple[Choice, ...] = ()
    choice: int = 0
    replay_bytes: int = 0
    capture_bytes: int = 0
    keeps_graphs: bool = False
    op_by_op: bool = False
    apart_bytes: int = 0
    at_peak: AtPeak | None = None
    budget: int | None = None
    stock_bytes: int | None = None
    folded_bytes: int | None = None
    untiled_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the device, without the image itself and the memory of other code."""
        return self.untiled_bytes or self.parts_bytes + (self.capture_bytes or self.replay_bytes)

    @property
    def parts_bytes(self) -> int:
        """Predicted peak of a step that runs op by op."""
        resident = self.halo_bytes if self.halos == "device" else 0
        return (
            self.parameter_bytes
            + resident
            + self.strip_bytes
            + self.tile_bytes
            + self.retained_bytes
            + self.stored_bytes
            + self.library_bytes
            + self.heap_bytes
            + self.record_bytes
            - self.apart_bytes
        )

    @property
    def replayed(self) -> bool:
        """Whether equivalent tiles are captured once and replayed."""
        return self.replay_bytes > 0

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.budget is None or self.peak_bytes <= self.budget

    def retained_of(self, stage: int) -> int:
        """The number of tiles of a stage whose graph is retained."""
        return self.retained_tiles[stage] if self.retained_tiles else 0

    def retained_within(self, free: int) -> int:
        """The number of tiles whose graph fits `free` bytes, if other forwards of the step retain theirs."""
        graph = self.retained_bytes // (self.retained - 1) if self.retained > 1 else self.tile_bytes
        if not graph:  # nothing was predicted, because the user set the tile without a budget
            return self.retained
        fit = 1 + (free - self.tile_bytes) // graph
        return self.retained if fit >= self.retained else max(0, fit - 1)  # a later backward also needs a tile

    @property
    def work(self) -> float:
        """Arithmetic and moved bytes of the step, relative to stock PyTorch."""
        if self.untiled_bytes:
            return 1.0
        stock, tiles = 3 if self.training else 1, self.tiles[0] * self.tiles[1] * len(self.sides)
        forwards = self.choices[self.choice].forwards
        retained = 1.0 if self.keeps_graphs else min(1.0, self.retained / tiles)  # these are not recomputed
        return (forwards - (forwards - stock) * retained) / stock

    def __str__(self) -> str:
        n, c, height, width = self.image
        lines = [
            ("image", f"{n} x {c} x {height} x {width} ({n * height * width / 1e6:.1f} Mpx)"),
            ("step", "training, two passes" if self.training else "inference, one pass"),
        ]
        if self.untiled_bytes:
            lines[1] = "step", "training, the whole image at once"
        else:
            lines += self._parts()
        lines.append(("predicted peak", format_bytes(self.peak_bytes)))
        if self.budget is not None:
            lines.append(("budget", f"{format_bytes(self.budget)} ({'fits' if self.fits else 'does not fit'})"))
        if self.choices:
            lines.append(("work", f"{self.work:.2f} times that of stock PyTorch"))
            if len(self.sides) > 1:
                lines.append(("stored maps", self.choices[self.choice].name))
        if self.stock_bytes is not None:
            times = f"{self.stock_bytes / self.peak_bytes:.1f} times this"
            lines.append(("stock PyTorch", f"{format_bytes(self.stock_bytes)} of tensors alone ({times})"))
        if self.folded_bytes is not None:
            lines.append(("norms folded", f"{format_bytes(self.folded_bytes)} in stock PyTorch"))
        return "\n".join(f"{name:<15} {text}" for name, text in lines)

    def _parts(self) -> list[tuple[str, str]]:
        """Tiles, and what the memory consists of."""
        lines = [
            ("tile", f"{self.tile[0]} x {self.tile[1]}, {self.tiles[0]} x {self.tiles[1]} of them"),
            ("parameters", format_bytes(self.parameter_bytes)),
            ("halos", f"{format_bytes(self.halo_bytes)} {PLACES[self.halos]}" if self.training else "none stored"),
            ("resident strips", format_bytes(self.strip_bytes)),
            ("one tile", format_bytes(self.tile_bytes)),
        ]
        if self.retained > 1:
            lines.append(("retained tiles", f"{format_bytes(self.retained_bytes)} ({self.retained} not recomputed)"))
        if self.stored_bytes:
            lines.append(("whole maps", format_bytes(self.stored_bytes)))
        if self.away_bytes:
            lines.append(("whole maps", f"{format_bytes(self.away_bytes)} {PLACES[self.maps]}"))
        if self.library_bytes:
            lines.append(("libraries", f"{format_bytes(self.library_bytes)} (compiled kernels or workspaces)"))
        if self.heap_bytes:
            lines.append(("heap", f"{format_bytes(self.heap_bytes)} (freed blocks that the process retains)"))
        if self.record_bytes:
            lines.append(("records", f"{format_bytes(self.record_bytes)} (of the network, for this plan)"))
        if self.apart_bytes:
            lines.append(("not resident", f"-{format_bytes(self.apart_bytes)} (of maps, strips and tile)"))
        if len(self.sides) > 1:
            lines.append(("stages", str(len(self.sides))))
        if self.capture_bytes:
            lines.append(
                ("captured step", f"{format_bytes(self.capture_bytes)} (graphs of tiles, and the rest of the step)")
            )
        elif self.replay_bytes:
            lines.append(("replayed tiles", format_bytes(self.replay_bytes)))
        return lines

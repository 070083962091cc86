"""A separate module as one op, which maps a tile of the image to an embedding (`engine/tilewise.py`).

For the scan it is an op that reads a window of `size` every `stride` pixels, like a convolution. The module processes
tiles in batches. If there are several, the backward computes each batch again, so that only the graph of one exists at
a time (`torch.utils.checkpoint`, which repeats the random numbers of the first computation).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from ...capture.program import Op, Watched
from ...errors import ChangedError, DataError, GigamorphError, UnsupportedError
from ...torch_private import BatchNorm, FakeTensor
from ..geometry import Gather
from .base import Block, Env, Local, Maps, Node, Refusal, need_nchw, rule
from .promote import promoted

TileIndex = tuple[int, int, int]  # image, row and column of a tile
Background = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModuleSettings:
    """Snapshot of a module's submodules, hooks, training modes, and numbers of PyTorch's own modules (eps, p).

    It excludes other modules' attributes, in which a forward may count.
    """

    were: tuple[tuple[nn.Module, tuple[tuple[str, Any], ...]], ...]
    parts: tuple[Any, ...]

    @staticmethod
    def of(module: nn.Module) -> ModuleSettings:
        """The current settings."""
        return ModuleSettings(tuple((child, _settings(child)) for child in module.modules()), _parts(module))

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Context manager that restores these settings.

        Raises:
            ChangedError: if modules or hooks have changed.
        """
        if _parts(self.were[0][0]) != self.parts:
            raise _changed("modules or hooks")
        now = [(child, settings) for child, were in self.were if (settings := _settings(child)) != were]
        for child, were in self.were if now else ():
            child.__dict__.update(were)
        try:
            yield
        finally:
            for child, settings in now:
                child.__dict__.update(settings)


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """Modules and their hooks."""
    found: list[Any] = []
    for child in module.modules():
        hooks = (child._forward_pre_hooks, child._forward_hooks, child._backward_pre_hooks, child._backward_hooks)
        found += [child, *(hook for kind in hooks for hook in kind.values())]
    return tuple(found)


def _changed(what: str) -> ChangedError:
    return ChangedError(
        f"tilewise: {what} of the module were changed after the forward, but the backward computes tiles with them "
        "again; change them after the backward"
    )


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    if not type(module).__module__.startswith("torch.nn."):
        return (("training", module.training),)
    return tuple((name, value) for name, value in module.__dict__.items() if type(value) in (bool, int, float))


@dataclass(frozen=True)
class Tiles(Watched):
    """How an image is cut into tiles, and the module that embeds them; see `tilewise`."""

    module: nn.Module
    settings: ModuleSettings
    size: tuple[int, int]
    stride: tuple[int, int]
    batch: int
    background: Background | None = None
    again: Callable[[], Tiles] | None = field(default=None, compare=False)

    def now(self, _state: Any) -> Tiles:
        return self if self.again is None else self.again()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Numbers of rows and columns of tiles."""
        if height < self.size[0] or width < self.size[1]:
            raise DataError(
                f"an image of {height} x {width} pixels is smaller than one tile of {self.size[0]} x {self.size[1]}; "
                "pad it, or pass tilewise a smaller size"
            )
        return (height - self.size[0]) // self.stride[0] + 1, (width - self.size[1]) // self.stride[1] + 1

    def rect(self, row: int, col: int) -> tuple[int, int, int, int]:
        """The rectangle of a tile: top, bottom, left, right."""
        top, left = row * self.stride[0], col * self.stride[1]
        return top, top + self.size[0], left, left + self.size[1]

    def empty(self, tile: Tensor) -> Tensor:
        """Mask (n,) of the tiles (n, C, h, w) that are background."""
        if callable(self.background):
            found = self.background(tile)
            if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != tile.shape[:1]:
                raise GigamorphError("background must return one truth value for each tile: a bool tensor (n,)")
            return found
        assert self.background is not None
        return tile.flatten(1).amax(1) <= self.background


def refuse_live_statistics(module: nn.Module, name: str = "") -> None:
    """Refuse norms in training mode: their statistics would be those of a batch of tiles.

    Raises:
        UnsupportedError: naming the norm.
    """
    for path, child in module.named_modules():
        if isinstance(child, BatchNorm) and (child.training or child.running_mean is None):
            raise UnsupportedError(
                f"tilewise: '{'.'.join(p for p in (name, path) if p)}' ({type(child).__name__}) is in training mode, "
                "so its statistics would depend on the tiles in a batch; put it in evaluation mode (.eval())"
            )


def probe(tiles: Tiles, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """The length and dtype of an embedding; refuses a module whose output for a tile depends on other tiles.

    It compares the outputs of two random tiles together and alone.
    """
    module = tiles.module
    before = {name: buffer._version for name, buffer in module.named_buffers() if not buffer.is_inference()}
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _as_it_was(module):
        two = _two(tiles, channels, device, dtype)
        states = torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)
        try:
            both = module(two)
        except (GigamorphError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GigamorphError(_fails(module, two, error)) from error
        _need_vectors(both, 2)
        after = torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)
        drawn = any(not torch.equal(a, b) for a, b in zip(states, after, strict=True))
        changed = next((n for n, b in module.named_buffers() if before.get(n, b._version) != b._version), None)
        if changed is not None:
            raise UnsupportedError(
                f"tilewise: the module changes its buffer '{changed}' at each call, which would count tiles and "
                "batches; put it in evaluation mode (.eval())"
            )
        if not drawn and not two.is_meta:
            alone, scale = module(two[:1]), both.abs().amax()
            if (both[:1] - alone).abs().amax() > 0.05 * scale:
                raise UnsupportedError(
                    "tilewise: the module's output for a tile depends on the other tiles of its batch (a norm in "
                    "training mode?); put it in evaluation mode (.eval())"
                )
    return both.shape[1], both.dtype


def _need_vectors(made: Any, count: int) -> None:
    """Check that a module returns one floating-point vector for each tile."""
    if not isinstance(made, Tensor) or made.dim() != 2 or made.shape[0] != count:
        what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise UnsupportedError(
            f"tilewise: the module returns {what} for {count} tiles, not vectors ({count}, D); pool or select inside "
            "it (timm: num_classes=0)"
        )
    if not (made.is_floating_point() or made.is_complex()):
        raise UnsupportedError(f"tilewise: the module returns {made.dtype}; it must return floating-point numbers")


def _fails(module: nn.Module, two: Tensor, error: Exception) -> str:
    """Error message for a module that fails on two tiles, with a remedy."""
    message = " ".join((str(error).strip().splitlines() or [""])[0].split()).rstrip(".")
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), two.dtype)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    remedy = "pass tiles that it accepts: another size, or images with its channels and dtype"
    if own != two.dtype:
        remedy = f"its parameters are {own}: convert the image, image.to({own})"
    if first is not None and first.in_channels != two.shape[1]:
        remedy = f"its first convolution takes {first.in_channels} channels: pass such images, or another module"
    return (
        f"tilewise: the module fails on 2 tiles {tuple(two.shape)} of {two.dtype} "
        f"({type(error).__name__}: {message}); {remedy}"
    )


def _two(tiles: Tiles, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Two different random tiles of the image's dtype."""
    shape = (2, channels, *tiles.size)
    if dtype.is_floating_point:
        return torch.rand(shape, device=device, dtype=dtype)
    return torch.randint(2 if dtype == torch.bool else 128, shape, device=device).to(dtype)


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Context manager that restores the attributes of a module, such as counters or stored features."""
    before = [(child, dict(child.__dict__)) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            child.__dict__.clear()
            child.__dict__.update(attributes)


def embed_tiles(x: Tensor, mask: Tensor | None, skipped: Tensor | None, tiles: Tiles, *state: Tensor) -> Tensor:
    """The op that is recorded instead of the module's ops; see the rule `embed_tiles`. It runs on fake tensors only."""
    if has_torch_function_unary(x):
        return handle_torch_function(embed_tiles, (x,), x, mask, skipped, tiles, *state)
    device = next(tiles.module.parameters(), torch.empty(0, device=x.device)).device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    # In another thread, where calls are neither recorded nor fake.
    with ThreadPoolExecutor(1) as thread:
        width, dtype = thread.submit(_probe_in, autocast, tiles, x.shape[1], device, x.dtype).result()
    made = x.new_empty((x.shape[0], width, *tiles.grid(*x.shape[2:])), dtype=dtype)
    leaves = (x, *state) if skipped is None else (x, skipped, *state)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    return made.requires_grad_().clone() if wanted else made


def _probe_in(autocast: tuple[bool, torch.dtype], tiles: Tiles, channels: int, device: torch.device, *more: Any):
    with torch.autocast(device.type, dtype=autocast[1], enabled=autocast[0]):
        return probe(tiles, channels, device, *more)


@rule("embed_tiles")
def embedding_of_tiles(op: Op, maps: Maps) -> Local | list[Node]:
    x, mask, skipped, tiles, *state = op.args
    value, output = x.value, op.outputs[0]
    if value not in maps or any(v in maps for v in (*(t.value for t in state), *([skipped.value] if skipped else []))):
        raise Refusal("'tilewise' cannot use weights that depend on the image")
    need_nchw(op, maps, value)
    shape = maps.shape(output)
    nodes: list[Node] = []
    reads: dict[int, Any] = {value: tuple(map(_windows, maps.size(value), shape[2:], tiles.size, tiles.stride))}
    if mask is not None:
        if mask.value not in maps:
            alone = Op(op.func, "mask", (mask,), {}, (mask.value,), (output,), (), op.module, line=op.line)
            alone, nodes = promoted(alone, maps, (2, 3), 4, size=(shape[2], shape[3]))
            mask = alone.args[0]
        if mask.value not in maps:
            raise Refusal("'tilewise' needs a mask with a value for each tile")
        reads[mask.value] = maps.pointwise(mask.value)
    inputs = (*reads, *(t.value for t in state), *([skipped.value] if skipped else []))
    own = Op(op.func, op.name, (), {}, tuple(dict.fromkeys(inputs)), op.outputs, (), op.module, op.autocast, op.line)
    names = [name for name, _ in named_state(tiles.module)]
    dtype = maps.program.values[output].dtype

    may_skip = tiles.background is not None or mask is not None
    skips = {value, *(t.value for t in state)} if may_skip else set[int]()

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        given = dict(zip(names, (env[t.value] for t in state), strict=True))
        keep = None if mask is None else env[mask.value][:, 0]
        base = None if skipped is None else env[skipped.value]

        def call(batch: Tensor) -> Tensor:
            with tiles.settings.put_back():  # also when the backward computes a tile again
                made = functional_call(tiles.module, given, (batch,))
            if isinstance(made, Tensor) and torch.is_grad_enabled() and not made.requires_grad:
                skips.clear()
            return made

        return (embed(env[value], keep, base, tiles, call, (shape[1], dtype)),)

    training = any(module.training for module in tiles.module.modules())
    return [*nodes, Local(own, reads, ((2, 3),), run, random=training, skips=skips)]


def _windows(size_in: int, size_out: int, size: int, stride: int) -> Gather:
    """The pixels of a tile along one axis. Not a `Window`: a module must not be captured as a CUDA graph."""
    first = range(0, size_out * stride, stride)
    return Gather(size_in, size_out, tuple(first), tuple(i + size - 1 for i in first))


def named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return [*module.named_parameters(), *module.named_buffers()]


# -- the second computation uses the module's first state --------------------------------------------------------------


class _State:
    """Snapshot of a module's tensors and settings, which the second computation uses; it refuses changed tensors."""

    def __init__(self, tiles: Tiles):
        self._module, self._settings = tiles.module, tiles.settings
        self._tensors = dict(named_state(tiles.module))
        self._versions = self._now()

    def call_again(self, batch: Tensor) -> Tensor:
        """The module's output with the tensors and settings of the snapshot."""
        if self._now() != self._versions:
            raise _changed("weights or buffers")
        with self._settings.put_back():
            if all(self._tensors.get(name) is tensor for name, tensor in named_state(self._module)):
                return self._module(batch)
            return functional_call(self._module, self._tensors, (batch,))  # the module has other tensors now

    @property
    def tensors(self) -> Iterable[Tensor]:
        return self._tensors.values()

    def _now(self) -> list[int]:
        return [_version(tensor) for tensor in self._tensors.values()]


def _version(x: Any) -> int:
    """PyTorch's version counter of a tensor; 0 if it has none."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


# -- computing --------------------------------------------------------------------------------------------------------


def embed(
    x: Any,
    keep: Tensor | None,
    skipped: Tensor | None,
    tiles: Tiles,
    call: Callable[[Tensor], Tensor],
    result: tuple[int, torch.dtype],
    convert: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """The grid of embeddings (N, D, h, w), computed in the memory of one batch of tiles.

    Args:
        x: (N, C, H, W), a tensor or an object with a `shape` and `read(top, bottom, left, right)`.
        keep: (N, h, w), true for tiles that are computed; None for all.
        skipped: the embedding of the other tiles, (D,) or one number; zeros if None.
        call: the module.
        result: length and dtype of an embedding.
        convert: moves tiles to the device of the module.
    """
    n, rows, cols = x.shape[0], *tiles.grid(*x.shape[2:])
    length, dtype = result
    fake = isinstance(x, FakeTensor)
    leaf = isinstance(x, Tensor) and x.requires_grad
    made: list[Tensor] = []
    indices: list[TileIndex] = []
    state = _State(tiles) if call is tiles.module and torch.is_grad_enabled() and not fake else None
    for batch in _batches(x, keep, tiles, (n, rows, cols), convert):
        indices.extend(batch.indices)
        if not torch.is_grad_enabled() or len(batch.indices) == n * rows * cols:  # the graph of one batch may stay
            made.append(call(batch()))
        else:  # a leaf's tiles are read once: their gradients go to the image once
            tiles_read = batch() if leaf else batch
            made.append(checkpoint(_Through(call, state), tiles_read, use_reentrant=False, preserve_rng_state=not fake))
        _need_vectors(made[-1], len(batch.indices))
    if made:
        length, dtype = made[0].shape[1], made[0].dtype
    base = torch.zeros(1, dtype=dtype) if skipped is None else skipped.to(dtype)
    if base.shape[0] not in (1, length):
        raise GigamorphError(
            f"skipped has {base.shape[0]} values, but an embedding of this module has {length}; pass as many, or one"
        )
    base = base.to(made[0].device) if made else convert(base).to(dtype)
    grid = base.expand(n * rows * cols, length)
    if made:
        index = torch.tensor([(image * rows + i) * cols + j for image, i, j in indices], device=grid.device)
        grid = grid.index_copy(0, index, torch.cat(made))
    elif state is not None:
        grid = _Uncomputed.apply(grid, *((x,) if isinstance(x, Tensor) else ()), *state.tensors)
    return grid.reshape(n, rows, cols, length).permute(0, 3, 1, 2)


class _Uncomputed(torch.autograd.Function):
    """The grid of an image whose tiles are all skipped; the gradients of the module's tensors are zeros."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tensors = tensors
        return grid.view_as(grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        wanted = zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(torch.zeros_like(tensor) if asked else None for tensor, asked in wanted)


class _Through:
    """Applies the module to a batch; a second call uses the state of the first."""

    def __init__(self, call: Callable[[Tensor], Tensor], state: _State | None):
        self.call, self.state, self.computed = call, state, False

    def __call__(self, batch: _Batch | Tensor) -> Tensor:
        tiles = batch() if isinstance(batch, _Batch) else batch
        again, self.computed = self.computed, True
        return self.state.call_again(tiles) if again and self.state is not None else self.call(tiles)


def _truth(keep: Tensor) -> Tensor:
    if keep.isnan().any():
        raise GigamorphError("the mask of tilewise has NaN; use true for tiles that are computed, and false for others")
    return keep.bool().cpu()


class _Batch:
    """Some tiles, which are read again when they are computed again."""

    def __init__(
        self, read: Callable[[Sequence[TileIndex]], Tensor], indices: Sequence[TileIndex], first: Tensor | None = None
    ):
        self.read, self.indices, self.first = read, indices, first

    def __call__(self) -> Tensor:
        tiles, self.first = self.first, None
        return self.read(self.indices) if tiles is None else tiles


def _batches(
    x: Any, keep: Tensor | None, tiles: Tiles, counts: tuple[int, int, int], convert: Callable[[Tensor], Tensor]
) -> Iterator[_Batch]:
    """The tiles to compute in row-major order, `tiles.batch` at a time."""
    wanted = None if keep is None or isinstance(keep, FakeTensor) else _truth(keep)
    skips_background = tiles.background is not None and not (isinstance(x, FakeTensor))

    version = _version(x)

    def read(indices: Sequence[TileIndex]) -> Tensor:
        if _version(x) != version:
            raise ChangedError(
                "tilewise: the image was written to after the forward, but the backward reads its tiles again; change "
                "it after the backward, or pass a copy"
            )
        found: dict[tuple[int, int], Tensor] = {}
        parts = []
        for image, i, j in indices:
            if isinstance(x, Tensor):
                top, bottom, left, right = tiles.rect(i, j)
                parts.append(x[image, :, top:bottom, left:right])
            else:
                if (i, j) not in found:
                    found[i, j] = x.read(*tiles.rect(i, j))
                parts.append(found[i, j][image])
        return convert(torch.stack(parts))

    waiting: list[TileIndex] = []
    seen: list[Tensor] = []
    n, rows, cols = counts
    for i, j in product(range(rows), range(cols)):
        here = [(image, i, j) for image in range(n) if wanted is None or wanted[image, i, j]]
        if here and skips_background:
            own = read(here)
            empty = tiles.empty(own.detach()).tolist()
            here = [index_of_tile for index_of_tile, is_empty in zip(here, empty, strict=True) if not is_empty]
            seen.extend(tile for tile, is_empty in zip(own, empty, strict=True) if not is_empty)
        waiting.extend(here)
        while len(waiting) >= tiles.batch:
            yield _Batch(read, waiting[: tiles.batch], torch.stack(seen[: tiles.batch]) if seen else None)
            waiting, seen = waiting[tiles.batch :], seen[tiles.batch :]
    if waiting:
        yield _Batch(read, waiting, torch.stack(seen) if seen else None)

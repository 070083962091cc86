"""Local morphs: find a module by its path, replace it in a copy of the network, and check the copy.

Every local morph is an `Edit`, a step that changes a network in place. So it can be repeated on a new network that gets
its weights afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .copying import as_ordered, cast, duplicate, named_tensors
from .example import Example, Inputs, as_inputs
from .labels import varies
from .running import distance, failures, has_fast_path, output_tensors
from .spaces import labelled_run
from .step import Edit, Report
from .stock import as_given, stock
from .verify import verified_report

Pair = Callable[[nn.Module, nn.Module], tuple[nn.Module, nn.Module]]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BYPASS_LIMIT = 1e-3  # relative difference between fast path and layers, far above the rounding of float32
# Layers with a known channel axis.
_CHANNEL_LAYERS = (nn.Linear, nn.LayerNorm, nn.GroupNorm, *CONVS, *TRANSPOSED, *BATCH_NORMS)


@torch.inference_mode(False)
@freed_pages_kept()
def morphed(
    model: nn.Module,
    step: Edit,
    example: Example,
    *,
    inplace: bool = False,
    rounded: bool = False,
    train: bool = True,
    view: Pair | None = None,
) -> tuple[nn.Module, Report]:
    """Apply an edit to a copy, check it, and return the copy, or the network itself after the same edit.

    Args:
        model: the parent.
        step: the edit.
        example: an input of the child.
        inplace: change `model` after the check.
        rounded: whether new weights are computed and rounded, not copied or split. If so, the comparison uses float64
            copies, where that rounding is 1e-16. In the network's own dtype the weights are rounded once.
        train: whether the morph is exact in train mode too.
        view: maps (parent, child) to the two networks that must be equal, if inputs or outputs changed.

    Raises:
        MorphError: the edit is not possible or not exact here; `model` is not changed.
    """
    given, model = model, stock(model, inplace)
    parent = cast(duplicate(model), torch.float64) if rounded else model
    child = duplicate(parent)
    changes = step.change(child)
    pair = view(parent, child) if view else (parent, child)
    try:
        report = verified_report(step, *pair, example, changes=changes, train=train)
    except MorphError as error:
        cause = error.__cause__
        if isinstance(cause, AttributeError | LookupError):
            raise MorphError(
                f"{_where(step)}: the network's code needs the replaced module to have its old class "
                f"({type(cause).__name__}: {cause}); the original is unchanged"
            ) from cause
        raise MorphError(f"{_where(step)}: {error}") from error
    _refuse_bypassed(child, parent, example)
    if inplace:
        step.change(model)
        return model, report
    if rounded:
        child = duplicate(model)
        step.change(child)
    return as_given(child, given), report


def _refuse_bypassed(child: nn.Module, parent: nn.Module, example: Example) -> None:
    """Refuse insertions that PyTorch's fast path would skip in eval mode, because it reads only known layers' weights.

    New parts do nothing yet, so a comparison with the parent cannot show this. Random weights make them visible.
    """
    if not has_fast_path(child):
        return
    known = named_tensors(parent)
    work = duplicate(child).eval()
    new = [p for name, p in work.named_parameters() if name not in known or known[name].shape != p.shape]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in new:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    inputs = as_inputs(example).random(0)
    dtype = next((p.dtype for p in work.parameters() if p.is_floating_point()), torch.float32)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.no_grad(), failures("the child cannot be run in eval mode"):
            as_run = output_tensors(inputs.call(work, inputs.to(dtype)))
            torch.backends.mha.set_fastpath_enabled(False)
            layer_by_layer = output_tensors(inputs.call(work, inputs.to(dtype)))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    if distance([t.double() for t in layer_by_layer], [t.double() for t in as_run]) > BYPASS_LIMIT:
        raise MorphError(
            "in eval mode PyTorch's fast path of nn.TransformerEncoderLayer skips the module inserted here; choose "
            "another module, or call torch.backends.mha.set_fastpath_enabled(False) now and wherever the child is used"
        )


def _where(step: Edit) -> str:
    return f"{step.op} at {', '.join(repr(path) for path in step.where)}" if step.where else step.op


# -- modules by path ---------------------------------------------------------------------------------------------


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, which must not be the model itself."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise MorphError(f"the model has no module '{path}'; print(model) shows the names") from None
    if module is model:
        raise MorphError("the model itself cannot be replaced; name a module inside it")
    return module


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replace the module at `path` by `new`, under all its names; new modules get its training mode."""
    old = module_at(model, path)
    unchanged = {id(module) for module in old.modules()}
    for module in new.modules():
        if id(module) not in unchanged:
            module.training = old.training
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def follow(model: nn.Module, path: str, *added: nn.Module) -> None:
    """Insert `added` directly after the module at `path`, which becomes `path.0`."""
    replace(model, path, nn.Sequential(module_at(model, path), *added))


def plain(model: nn.Module, path: str, *kinds: type[nn.Module]) -> Any:
    """Return the module at `path`; it must be one of `kinds`, and compute with its stored weight."""
    module = module_at(model, path)
    kind = next((k for k in kinds if isinstance(module, k)), None)
    if kind is None:
        names = ", ".join(k.__name__ for k in kinds)
        raise MorphError(f"module '{path}' is a {type(module).__name__}; this morph needs one of {names}")
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            raise MorphError(
                f"module '{path}' ({type(module).__name__}) overrides {method}; replace it by a plain {kind.__name__}"
            )
    if parametrize.is_parametrized(module) or module._forward_pre_hooks:
        raise MorphError(f"module '{path}' computes its weight (parametrization or hook); remove that first")
    refuse_shared(model, path, module)
    return module


def refuse_shared(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuse if another module shares a parameter of `module`, because a morph would untie them."""
    own = {id(p) for p in module.parameters()}
    inside = {id(m) for m in module.modules()}
    for name, other in model.named_modules():
        if id(other) not in inside and own & {id(p) for p in other.parameters(recurse=False)}:
            raise MorphError(f"module '{path}' shares a weight with '{name}'; a morph would untie them")


def cast_like(new: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """Convert `new` to the dtype, memory format and device of the weights at `path`, or else of the model's."""
    like = next((p for m in (module_at(model, path), model) for p in m.parameters() if p.is_floating_point()), None)
    if like is None:
        return new
    return as_ordered(new.to(device=like.device, dtype=like.dtype), model)


# -- channels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Output of a module.

    Attributes:
        channels: number of channels.
        dims: number of image axes after the channels; 0 if the channels are on the last axis.
        rank: number of all axes.
        values: number of values per channel on the example's batch.
    """

    channels: int
    dims: int
    rank: int
    values: int = field(compare=False)


@torch.inference_mode(False)
def site(model: nn.Module, path: str, example: Example) -> Site:
    """Find the channels in the output of the module at `path`, from one run of a copy on the example.

    Raises:
        MorphError: the module is not called, does not return a single tensor, returns several widths, or has an
            ambiguous channel axis.
    """
    model = stock(model)
    axis = (
        None if isinstance(module_at(model, path), _CHANNEL_LAYERS) else _followed_axis(model, path, as_inputs(example))
    )
    work = duplicate(model).eval()
    target = module_at(work, path)
    known: list[tuple[int, bool]] = [(-1, True)]  # the latest layer's width, and whether its channels are on axis 1
    found: set[Site] = set()

    def look(module: nn.Module, _args: Any, result: Any) -> None:
        batch = isinstance(result, Tensor) and result.ndim >= 2
        layer = _layer(module, result) if batch else None
        if layer is not None:
            known[0] = layer
        if module is target:
            if not batch:
                raise MorphError(f"module '{path}' does not return one batch of features; name another module")
            found.add(_site(path, result, known[0], layer is not None, axis))

    if isinstance(target, torch.jit.ScriptModule):
        raise MorphError(
            f"module '{path}' is TorchScript, so nothing can be inserted in it or after it; give the eager module"
        )
    for module in work.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(look)
    like = next((p for p in work.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = as_inputs(example)
    with torch.no_grad(), failures("the model cannot be run on the example"):
        inputs.call(work, inputs.to(like.dtype))
    if not found:
        raise MorphError(f"module '{path}' is not called in the forward; name a module that is")
    if len(found) > 1:
        widths = ", ".join(str(s.channels) for s in sorted(found, key=lambda s: s.channels))
        raise MorphError(f"module '{path}' is called several times with different widths ({widths}); name another one")
    return found.pop()


def _followed_axis(model: nn.Module, path: str, inputs: Inputs) -> int | None:
    """Return the channel axis of the output according to the labels, or None if they do not determine it."""
    work = duplicate(model)
    axes: list[int] = []

    def look(_module: nn.Module, _args: Any, result: Any) -> None:
        label = getattr(result, "_morph_label", None)
        if label is not None:
            axes.extend(a for a in range(result.ndim) if varies(label.atoms, [a]))
        raise MorphError("seen")  # stops the run, because later ops are not needed

    target = module_at(work, path)
    if isinstance(target, torch.jit.ScriptModule):
        return None
    target.register_forward_hook(look)
    with suppress(MorphError):  # a network that cannot be followed can still be changed locally
        labelled_run(work, inputs)
    return axes[0] if len(axes) == 1 else None


def _layer(module: nn.Module, result: Tensor) -> tuple[int, bool] | None:
    """Return the width of a layer's output, and whether it is on axis 1; None for a module of unknown width."""
    if isinstance(module, nn.Linear):
        return module.out_features, result.ndim == 2
    if type(module).forward is nn.LayerNorm.forward:
        return int(module.normalized_shape[-1]), False  # pyright: ignore
    for name in ("out_channels", "num_features", "num_channels"):
        width = getattr(module, name, None)
        if isinstance(width, int) and result.shape[1] == width:
            return width, True
    return None


def _site(path: str, result: Tensor, latest: tuple[int, bool], certain: bool, axis: int | None) -> Site:
    width, first = latest
    shape, dims = result.shape, result.ndim - 2
    if not dims:
        return Site(shape[1], 0, 2, shape[0])
    on_first, on_last = shape[1] == width, shape[-1] == width
    if axis is not None:
        if axis not in (1, result.ndim - 1):
            raise MorphError(f"module '{path}' returns {tuple(shape)} with channels on axis {axis}; name another one")
        first = axis == 1
    elif not certain:
        if (width < 0 and dims == 1) or (not first and on_first == on_last):  # an image has them on axis 1
            raise MorphError(f"module '{path}' returns {tuple(shape)} with an ambiguous channel axis; name a layer")
        first = on_first if not first else on_first or not on_last
    if first and dims > 3:
        raise MorphError(f"module '{path}' returns {result.ndim} axes; at most 5 are supported")
    channels = shape[1 if first else -1]
    return Site(channels, dims if first else 0, result.ndim, result.numel() // channels)


def spatial(value: int | Iterable[int], dims: int, name: str) -> tuple[int, ...]:
    """Expand one number, or one number per image axis, to a tuple of `dims` numbers."""
    values = tuple(value) if isinstance(value, Iterable) else (value,) * dims
    if len(values) != dims or any(not isinstance(v, int) or v < 1 for v in values):
        raise MorphError(f"{name} {value!r} does not fit {dims} image axes; give one positive number or one per axis")
    return values

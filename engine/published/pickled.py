"""Whole modules that were pickled: opened where their code is installed, in a process of its own, and only if trusted.

To open such a file runs what is in it. The process that does so gives back tensors and the logits of a fixed image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..models.checkpoints import State, read_state
from ..models.reference import LIMIT32, difference
from ..models.weights import own_tensors

_DEPTH = 3  # of containers in which modules are looked for
_STATE, _KIND, _IMAGE, _LOGITS = "state.safetensors", "kind.json", "image.safetensors", "logits.safetensors"


@dataclass(frozen=True)
class Extracted:
    """What was in a pickle: weights, and the name of the module's class."""

    state: State
    kind: str


def holds_module(path: Path) -> bool:
    """Whether a file holds a pickled module, and no state dict. Nothing in it is executed."""
    if path.suffix == ".safetensors":
        return False
    try:
        read_state(path)
    except DataError as error:
        return "--trust" in str(error)
    return False


def extract(path: Path, prefix: str = "") -> Extracted:
    """Open a pickled module in a process of its own, for its weights.

    Args:
        prefix: of the sub-module that is taken; or the place of the module, in a file that holds several.

    Raises:
        DataError: it cannot be opened, its code is not installed, it holds several modules and the prefix names none of
            them, or there is no such sub-module.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        _open(path, Path(name), prefix)
        kind = json.loads((Path(name) / _KIND).read_text())
        return Extracted(State(path, load_file(Path(name) / _STATE)), kind)


def logits(path: Path, image: Tensor, prefix: str = "") -> Tensor:
    """What a pickled module gives for an image (1, C, H, W), in a process of its own.

    Raises:
        DataError: it does not take the image, or gives no tensor.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as name:
        save_file({"image": image.contiguous()}, Path(name) / _IMAGE)
        _open(path, Path(name), prefix)
        return load_file(Path(name) / _LOGITS)["logits"]


def _open(path: Path, folder: Path, prefix: str) -> None:
    command = [sys.executable, "-c", _CHILD, str(path.resolve()), str(folder), prefix.removesuffix(".")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        missing = said.startswith(("ModuleNotFoundError", "ImportError", "AttributeError"))
        remedy = "; run this where its code is installed" if missing else ""
        raise DataError(f"{path}: the pickled module cannot be used: {said}{remedy}")


def same_logits(found: Extracted, wanted: Tensor, given: Tensor, name: str) -> None:
    """Refuse a network that gives other logits than the pickled module gave."""
    if wanted.shape != given.shape or not difference(given, wanted) <= LIMIT32:
        far = "another shape" if wanted.shape != given.shape else f"{difference(given, wanted):.1e}"
        raise GigamorphError(
            f"model {name!r} with the weights of the pickled {found.kind} does not give its logits: they differ by "
            f"{far}; name the factory and the arguments that it was made with"
        )


def dump(path: str, folder: str, prefix: str) -> None:
    """In the process of its own: what `logits` reads where there is an image, else what `extract` reads."""
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path.cwd()))
    with warnings.catch_warnings():  # of TorchScript, which torch.load gives to torch.jit.load
        warnings.simplefilter("ignore")
        loaded = torch.load(path, map_location="cpu", weights_only=False)
    network = _chosen(loaded, prefix).float().eval()
    if not (Path(folder) / _IMAGE).is_file():
        state = {name: value.detach().clone().contiguous() for name, value in own_tensors(network).items()}
        save_file(state, Path(folder) / _STATE)
        (Path(folder) / _KIND).write_text(json.dumps(_kind(network)))
        return
    image = load_file(Path(folder) / _IMAGE)["image"]
    with torch.no_grad():
        found = network(image)
    if not isinstance(found, Tensor):
        raise SystemExit(f"it gives a {type(found).__name__} for an image, not a tensor")
    save_file({"logits": found.contiguous()}, Path(folder) / _LOGITS)


def _chosen(loaded: Any, prefix: str) -> nn.Module:
    """The module in what a file holds, or what the prefix names: a place in the file, a part of the module there."""
    found = dict(_modules(loaded))
    found = {place: module for place, module in found.items() if module.state_dict()} or found  # no loss functions
    if not found:
        raise SystemExit(f"it holds a {type(loaded).__name__}, not a torch.nn.Module")
    named = [place for place in found if place and f"{prefix}.".startswith(f"{place}.")]
    if len(found) > 1 and not named:
        listed = ", ".join(f"{place} ({type(module).__name__})" for place, module in found.items())
        raise SystemExit(f"it holds several: {listed}; name the one that is meant, as in --prefix {next(iter(found))}")
    place = next(iter(found))
    if named and (len(found) > 1 or _part(found[place], prefix) is None):
        place, prefix = named[0], prefix.removeprefix(named[0]).removeprefix(".")
    whole = found[place]
    part = _part(whole, prefix)
    if part is None:
        parts = ", ".join(name for name, _ in whole.named_children())
        raise SystemExit(f"its {type(whole).__name__} has no part {prefix!r}; it has {parts}")
    return part


def _modules(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """All modules in dictionaries and lists, with their places."""
    if isinstance(loaded, nn.Module):
        yield place, loaded.module if isinstance(loaded, nn.DataParallel) else loaded
    elif isinstance(loaded, dict | list | tuple) and depth < _DEPTH:
        for key, value in loaded.items() if isinstance(loaded, dict) else enumerate(loaded):
            yield from _modules(value, f"{place}.{key}" if place else str(key), depth + 1)


def _kind(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript module {module.original_name}"
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _part(module: nn.Module, name: str) -> nn.Module | None:
    part: Any = module
    for one in name.split(".") if name else ():  # get_submodule is not there in TorchScript
        part = getattr(part, one, None)
    return part if isinstance(part, nn.Module) else None


_CHILD = (
    "import sys\n"
    "from gigamorph.engine.models.compat import make_torchvision_importable\n"
    "make_torchvision_importable()\n"
    "from gigamorph.engine.published.pickled import dump\n"
    "dump(*sys.argv[1:])\n"
)

"""Pickled whole modules: opened in a separate process, with their code installed, and only if trusted.

Opening such a file executes it. The process returns tensors and the logits of a fixed image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..files import write_tensors
from ..models.checkpoints import WeightFile, read_state
from ..models.reference import LIMIT32, difference
from ..models.weights import own_tensors

_DEPTH = 3  # of nested containers searched for modules
_STATE, _KIND, _IMAGE, _LOGITS = "state.safetensors", "kind.json", "image.safetensors", "logits.safetensors"


def holds_module(path: Path) -> bool:
    """Whether a file contains a pickled module and no state dict. Nothing in it is executed."""
    if path.suffix == ".safetensors":
        return False
    try:
        read_state(path)
    except DataError as error:
        return "--trust" in str(error)
    return False


def extract(path: Path, prefix: str = "") -> tuple[WeightFile, str]:
    """Open a pickled module in a separate process, and return its weights and the name of its class.

    Args:
        prefix: selects a sub-module; or the module under this key, if the file contains several.

    Raises:
        DataError: it cannot be opened, its code is not installed, the file contains several modules and the prefix
            selects none of them, or there is no such sub-module.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        _run_child(path, Path(name), prefix)
        kind = json.loads((Path(name) / _KIND).read_text())
        return WeightFile(path, load_file(Path(name) / _STATE)), kind


def logits(path: Path, image: Tensor, prefix: str = "") -> Tensor:
    """Return the output of a pickled module for an image (1, C, H, W), computed in a separate process.

    Raises:
        DataError: it does not accept the image, or does not return a tensor.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        write_tensors(Path(name) / _IMAGE, {"image": image}, "image")
        _run_child(path, Path(name), prefix)
        return load_file(Path(name) / _LOGITS)["logits"]


def _run_child(path: Path, folder: Path, prefix: str) -> None:
    command = [sys.executable, "-c", _CHILD_CODE, str(path.resolve()), str(folder), prefix.removesuffix(".")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        missing = said.startswith(("ModuleNotFoundError", "ImportError", "AttributeError"))
        remedy = "; run this where its code is installed" if missing else ""
        raise DataError(f"{path}: the pickled module cannot be used: {said}{remedy}")


def same_logits(kind: str, wanted: Tensor, given: Tensor, name: str) -> None:
    """Refuse a network whose logits differ from those of the pickled module of class `kind`."""
    if wanted.shape != given.shape or not difference(given, wanted) <= LIMIT32:
        far = "another shape" if wanted.shape != given.shape else f"{difference(given, wanted):.1e}"
        raise GigamorphError(
            f"model {name!r} with the weights of the pickled {kind} does not have its logits: they differ by "
            f"{far}; use the factory and the arguments that built the module"
        )


def dump(path: str, folder: str, prefix: str) -> None:
    """Run in the separate process: write the input of `logits` if there is an image, else that of `extract`."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(Path.cwd()))
    with warnings.catch_warnings():  # TorchScript's, which torch.load passes to torch.jit.load
        warnings.simplefilter("ignore")
        loaded = torch.load(path, map_location="cpu", weights_only=False)
    network = _select_module(loaded, prefix).float().eval()
    if not (Path(folder) / _IMAGE).is_file():
        write_tensors(Path(folder) / _STATE, own_tensors(network), "weights")
        (Path(folder) / _KIND).write_text(json.dumps(_class_name(network)))
        return
    image = load_file(Path(folder) / _IMAGE)["image"]
    with torch.no_grad():
        found = network(image)
    if not isinstance(found, Tensor):
        raise SystemExit(f"it returns a {type(found).__name__} for an image, not a tensor")
    write_tensors(Path(folder) / _LOGITS, {"logits": found}, "logits")


def _select_module(loaded: Any, prefix: str) -> nn.Module:
    """Return the module in a file's content, or the one that the prefix selects: by its key, then by its sub-module."""
    found = dict(_modules(loaded))
    found = {place: module for place, module in found.items() if module.state_dict()} or found  # no loss functions
    if not found:
        raise SystemExit(f"it contains a {type(loaded).__name__}, not a torch.nn.Module")
    named = [place for place in found if place and f"{prefix}.".startswith(f"{place}.")]
    if len(found) > 1 and not named:
        listed = ", ".join(f"{place} ({type(module).__name__})" for place, module in found.items())
        raise SystemExit(f"it contains several modules: {listed}; select one, as in --prefix {next(iter(found))}")
    place = next(iter(found))
    if named and (len(found) > 1 or _submodule(found[place], prefix) is None):
        place, prefix = named[0], prefix.removeprefix(named[0]).removeprefix(".")
    whole = found[place]
    part = _submodule(whole, prefix)
    if part is None:
        parts = ", ".join(name for name, _ in whole.named_children())
        raise SystemExit(f"its {type(whole).__name__} has no sub-module {prefix!r}; it has {parts}")
    return part


def _modules(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules in dictionaries and lists, with their keys."""
    if isinstance(loaded, nn.Module):
        yield place, loaded.module if isinstance(loaded, nn.DataParallel) else loaded
    elif isinstance(loaded, dict | list | tuple) and depth < _DEPTH:
        for key, value in loaded.items() if isinstance(loaded, dict) else enumerate(loaded):
            yield from _modules(value, f"{place}.{key}" if place else str(key), depth + 1)


def _class_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript module {module.original_name}"
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    part: Any = module
    for one in name.split(".") if name else ():  # TorchScript has no get_submodule
        part = getattr(part, one, None)
    return part if isinstance(part, nn.Module) else None


_CHILD_CODE = (
    "import sys\n"
    "from gigamorph.engine.models.compat import make_torchvision_importable\n"
    "make_torchvision_importable()\n"
    "from gigamorph.engine.published.pickled import dump\n"
    "dump(*sys.argv[1:])\n"
)

"""Whole modules that were pickled: opened where their code is installed, in a process of its own, and only if trusted.

To open such a file runs what is in it. The process that does so gives back tensors and the logits of a fixed image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DataError, GigamorphError
from ..models.weights import State, read_state
from .reference import LIMIT32, difference


@dataclass(frozen=True)
class Extracted:
    """What was in a pickle: weights, the name of the module's class, and its logits of the image that was given."""

    state: State
    kind: str
    logits: Tensor


def holds_module(path: Path) -> bool:
    """Whether a file holds a pickled module, and no state dict. Nothing in it is executed."""
    if path.suffix == ".safetensors":
        return False
    try:
        read_state(path)
    except DataError as error:
        return "--trust" in str(error)
    return False


def extract(path: Path, image: Tensor) -> Extracted:
    """Open a pickled module in a process of its own, and give an image (1, C, H, W) to it.

    Raises:
        DataError: it cannot be opened, its code is not installed, or it does not take the image.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"image": image}, folder / "image.safetensors")
        command = [sys.executable, "-c", _CHILD, str(path.resolve()), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = folder / "result.json"
        if done.returncode or not result.is_file():
            said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise DataError(f"{path}: the pickled module cannot be used: {said}; run this where its code is installed")
        found = load_file(folder / "state.safetensors")
        logits = found.pop("\0logits")
        return Extracted(State(path, found), json.loads(result.read_text())["kind"], logits)


def same_logits(found: Extracted, given: Tensor, name: str) -> None:
    """Refuse a network that gives other logits than the pickled module gave."""
    if found.logits.shape != given.shape or not difference(given, found.logits) <= LIMIT32:
        far = "another shape" if found.logits.shape != given.shape else f"{difference(given, found.logits):.1e}"
        raise GigamorphError(
            f"model {name!r} with the weights of the pickled {found.kind} does not give its logits: they differ by "
            f"{far}; name the factory and the arguments that it was made with"
        )


def dump(path: str, folder: str) -> None:
    """In the process of its own: what `extract` reads."""
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path.cwd()))
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    if isinstance(loaded, dict):
        loaded = next((v for v in loaded.values() if isinstance(v, nn.Module)), loaded)
    if not isinstance(loaded, nn.Module):
        raise SystemExit(f"it holds a {type(loaded).__name__}, not a torch.nn.Module")
    if isinstance(loaded, nn.DataParallel):
        loaded = loaded.module
    network = loaded.float().eval()
    image = load_file(Path(folder) / "image.safetensors")["image"]
    with torch.no_grad():
        logits = network(image)
    if not isinstance(logits, Tensor):
        raise SystemExit(f"it gives a {type(logits).__name__} for an image, not a tensor")
    state = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    save_file({**state, "\0logits": logits.contiguous()}, Path(folder) / "state.safetensors")
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    (Path(folder) / "result.json").write_text(json.dumps({"kind": kind}))


_CHILD = (
    "import sys\n"
    "from gigamorph.engine.models.compat import make_torchvision_importable\n"
    "make_torchvision_importable()\n"
    "from gigamorph.engine.published.pickled import dump\n"
    "dump(*sys.argv[1:])\n"
)

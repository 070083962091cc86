"""Frozen extractors: networks without their classifier, with self-supervised weights from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, GigamorphError
from ...models import create_model

# Where the files of VISSL (SimCLR), SwAV and DINO keep the backbone's tensors, and what they put before their names.
_PATHS = (("classy_state_dict", "base_model", "model", "trunk"), ("teacher",), ("state_dict",), ("model",))
_PREFIXES = ("module.", "backbone.", "_feature_blocks.")
# What was trained beside the backbone, or is the classifier of one.
_HEADS = ("projection_head.", "prototypes.", "head.", "fc.", "classifier.", "last_layer.", "mlp.")


class Extractor(nn.Module):
    """(N, C, H, W) -> (N, dim).

    Args:
        network: any network.
        blocks: 0 takes what goes into its last linear layer, the classifier, which is cut off. n takes the class
            tokens of the last n blocks of a vision transformer of timm, each normalised, side by side.
    """

    def __init__(self, network: nn.Module, blocks: int = 0) -> None:
        super().__init__()
        self.network, self.blocks = network, blocks
        if blocks and not hasattr(network, "forward_intermediates"):
            raise GigamorphError(f"{type(network).__name__} has no blocks with class tokens; take blocks = 0")
        last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not blocks and not last:
            raise GigamorphError(f"{type(network).__name__} has no linear layer that is its classifier")
        # A transformer of timm that is built for tokens still has its classifier.
        if last and (not blocks or last[-1] == "head"):
            _replace(network, last[-1], nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if not self.blocks:
            return self.network(x)
        found = self.network.forward_intermediates(  # pyright: ignore[reportCallIssue]
            x, indices=self.blocks, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        return torch.cat([tokens[:, 0] for _, tokens in found], 1)


def make_extractor(model: str, channels: int, weights: str | Path | None = None, blocks: int = 0) -> Extractor:
    """An extractor of a network by its name, as for `create_model`; see `load_backbone` for the file of weights."""
    extractor = Extractor(create_model(model, 2, channels), blocks)
    if weights is not None:
        load_backbone(extractor.network, weights)
    return extractor


def load_backbone(network: nn.Module, path: str | Path) -> list[str]:
    """Load self-supervised weights: safetensors, or the torch files of VISSL, SwAV and DINO as they are published.

    Returns:
        The names of tensors of projection heads, prototypes and classifiers, which are omitted.

    Raises:
        DataError: the file cannot be read without running code in it, or does not fit the network.
    """
    path = Path(path)
    state = _strip(_unwrap(_read(path), path))
    own = network.state_dict()
    left_out = [name for name in state if name not in own and name.startswith(_HEADS)]
    problems = [
        f"{name} is {tuple(value.shape)}, the network has {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    problems += [f"{name} is missing" for name in own if name not in state and not name.endswith("num_batches_tracked")]
    problems += [f"{name} is not in the network" for name in state if name not in own and name not in left_out]
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{path}: weights do not fit the network: {problems[0]}{rest}")
    network.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    return left_out


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such weights file") from error
    except Exception as error:  # each reader has its own errors for a damaged file
        raise DataError(f"{path}: not a readable weights file: {str(error).splitlines()[0]}") from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for keys in _PATHS:
        inner = loaded
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            loaded = inner
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise DataError(f"{path}: holds no state_dict; save one with torch.save(network.state_dict(), path)")
    return loaded


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes, which some files have on every tensor and others on the backbone's only."""
    found = dict(state)
    for prefix in _PREFIXES:
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


class Fused(nn.Module):
    """Extractors and a head on the list of their embeddings, as one network of images."""

    def __init__(self, extractors: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.extractors, self.head = nn.ModuleList(extractors), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head([extractor(x) for extractor in self.extractors])

"""Initialisations of a patch classifier: random, published weights, SimCLR, BYOL, or the Siamese networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import GigamorphError
from ....models import build_model
from ....train.checkpoint import save_torch
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.stages import Stage
from ..weights import find_weights, load_pretrained
from .config import SiameseConfig
from .network import Embedding
from .patches import PatchPairs
from .two_views import BYOLTask, SimCLRTask

_TASKS = {"simclr": SimCLRTask, "byol": BYOLTask}


def make_network(config: SiameseConfig, run: Run, number: int, *, weights: bool = True) -> Embedding:
    """Build the configured network with its weights, if any; other weights are random, drawn for `number`."""
    torch.manual_seed(seed_of(run.seed, 0, number))
    if weights and config.weights == "timm":
        network = _timm_network(config)
    else:
        network = build_model(config.model, 2, config.channels)
        path = find_weights(config.weights, config.mean, config.std) if weights else None
        if path is not None:
            load_pretrained(network, path)
    return Embedding(network, config.layer, config.dim, config.channels, config.patch).to(run.device)


def _timm_network(config: SiameseConfig) -> nn.Module:
    """Build the network with timm's published weights (mostly ImageNet's), adapted to the image's channels."""
    kind, _, name = config.model.partition(":")
    if kind != "timm":
        raise GigamorphError('weights = "timm" needs model = "timm:NAME"; set one, or set weights to a file')
    build_model(config.model, 2, config.channels)  # reports a missing timm or model
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=2, in_chans=config.channels)
    except Exception as error:  # various errors, if there are none or the download fails
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GigamorphError(
            f"timm cannot provide weights of {name!r} ({reason}); download them once online, or set weights to a file"
        ) from error


def make_starts(siamese: Embedding, patches: PatchPairs, config: SiameseConfig, run: Run) -> dict[str, Embedding]:
    """Build the starts of the configuration, in its order.

    SimCLR and BYOL begin with the weights of the first Siamese network and store theirs in ``starts/NAME``.
    """
    found: dict[str, Embedding] = {}
    for name in config.starts:
        if name == "siamese":
            found[name] = siamese
        elif name == "scratch":
            found[name] = make_network(config, run, 8, weights=False)
        elif name == "weights":
            found[name] = make_network(config, run, 0)
        else:
            own = run.part(f"starts/{name}")
            found[name] = self_supervised(name, make_network(config, run, 0), patches, config, own)
            write_encoder(found[name], own.out)
    return found


def self_supervised(
    name: str, embedding: Embedding, pairs: Sequence[Any] | Tensor, config: SiameseConfig, run: Run
) -> Embedding:
    """Train an embedding's encoder with "simclr" or "byol" on the patches (n, 2, C, h, w) of pairs, and return it.

    Epochs, steps, patches per step, rate and decay are those of the Siamese networks.
    """
    task = _TASKS[name](embedding, pairs, config, run.device)
    stage = Stage(
        name,
        config.epochs,
        config.lr,
        trainable=task.trainable,
        weight_decay=config.weight_decay,
        batch_size=2 * config.batch_size * config.accumulate,
    )
    run_stages(task, [stage], run.undealt())
    task.check_collapse()
    return embedding


def write_encoder(embedding: Embedding, folder: Path) -> None:
    """Write ``encoder.pt``: a state_dict of the backbone, for `create_model`."""
    state = embedding.maps.network.state_dict()
    save_torch(state, folder / "encoder.pt", "encoder")

"""Initialisations of a patch classifier: random, published weights, SimCLR, BYOL, or the Siamese networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import GigamorphError
from ....models import build_model
from ....train.checkpoint import save_torch
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ....train.task import Task
from ..tensors import ReadAhead, Sliceable
from ..weights import build_pretrained, find_weights
from .config import SiameseConfig
from .network import Embedding, at_least_float32, without_autocast
from .patches import PatchFiles, cropped, jittered, mirrored

_CHECKED_PATCHES = 512  # patches in the check for collapse
_COLLAPSED = 1e-3  # minimal standard deviation of projections, which is 1 / sqrt(dim) if evenly spread


class Projected(nn.Module):
    """Patches (N, C, h, w) -> projections of the encoder's features."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean((2, 3)))


class TwoViews(Task):
    """Training on patches without labels; a method derives a class with its `projected` network and its loss.

    Args:
        pairs: (n, 2, C, h, w), by index; each of the two patches is an example.
    """

    trainable: tuple[str, ...] = ("*",)
    """`trainable` of the `Stage`."""
    projected: Projected

    def __init__(self, pairs: Sliceable, config: SiameseConfig, device: str) -> None:
        self.pairs, self.config, self.device = pairs, config, device
        self._ahead = ReadAhead(self._read)

    def examples(self, epoch: int) -> Sequence[int]:
        return range(2 * len(self.pairs))

    def ahead(self, batch: Sequence[int]) -> None:
        self._ahead.announce(batch)

    def begin_epoch(self, epoch: int) -> None:
        if epoch:
            self.check_collapse()

    @torch.no_grad()
    def check_collapse(self) -> float:
        """Return the mean standard deviation of the normalised projections' values over some patches.

        Raises:
            GigamorphError: it is close to zero, because the network's output is the same for all patches.
        """
        count = 2 * len(self.pairs)
        x = self.patches(range(0, count, -(-count // _CHECKED_PATCHES)))
        found = float(torch.cat([F.normalize(self.projected(part), dim=1) for part in x.split(128)]).std(0).mean())
        if found < _COLLAPSED:
            raise GigamorphError(f"the projections have collapsed (standard deviation {found:.1e}); reduce lr")
        return found

    def views(self, batch: Sequence[int]) -> Tensor:
        """Return (2 n, C, h, w): one random view of each patch, then another of each."""
        x = self._ahead.take(batch).to(self.device)
        x = mirrored(cropped(x.repeat(2, 1, 1, 1), self.config.crop))
        return jittered(x, self.config.jitter, self.config.noise)

    def patches(self, indices: Sequence[int]) -> Tensor:
        """Return (n, C, h, w): the pairs' left and right patches alternately."""
        return self._read(indices).to(self.device)

    def _read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.pairs[index // 2][index % 2] for index in indices])


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the loss of SimCLR, averaged over both orders of all pairs of views a, b (n, dim).

    l(i, j) = -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t))      eq. 1; s the cosine of two projections
    """
    z = F.normalize(at_least_float32(torch.cat([a, b])), dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with without_autocast(z):
        logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


class SimCLRTask(TwoViews):
    """SimCLR (Chen et al., arXiv 2002.05709): identify a patch's other view among all views of the batch.

    The loss is `nt_xent` on projections of the encoder's features by a head of two linear layers.
    """

    def __init__(self, embedding: Embedding, pairs: Sliceable, config: SiameseConfig, device: str = "cpu") -> None:
        super().__init__(pairs, config, device)
        width = embedding.project.in_features
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.dim))
        self.module = self.projected = Projected(embedding.maps, head)

    def loss(self, batch: Sequence[int]) -> Tensor:
        first, second = self.projected(self.views(batch)).chunk(2)
        return nt_xent(first, second, self.config.temperature)


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Return eq. 2, averaged over predictions p of targets z (n, dim), which get no gradient."""
    p, z = at_least_float32(p), at_least_float32(z).detach()
    return (2 - 2 * F.cosine_similarity(p, z, dim=1)).mean()


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Apply eq. 4 to parameters; each network keeps its own running statistics."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - tau)


def tau_at(step: int, steps: int, base: float) -> float:
    """Return the target's momentum, which rises from `base` at the first step to 1 at the end."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


class BYOLTask(TwoViews):
    """BYOL (Grill et al., arXiv 2006.07733): a network predicts its slow copy's projection of another view.

    L = |p / |p| - z / |z||^2 = 2 - 2 <p, z> / (|p| |z|)                  eq. 2; both orders of the views are added
    theta <- optimizer(theta, grad L)                                     eq. 3; the online network, with its predictor
    xi <- tau xi + (1 - tau) theta                                        eq. 4; the target
    tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2                         at step k of K

    The trained encoder is the online network's.

    The target is updated at the beginning of a step, after the previous optimizer step. It is part of the checkpoint,
    as is the number of steps.
    """

    trainable = ("online", "predictor")

    def __init__(self, embedding: Embedding, pairs: Sliceable, config: SiameseConfig, device: str = "cpu") -> None:
        super().__init__(pairs, config, device)
        self.projected = Projected(embedding.maps, _mlp(embedding.project.in_features, config))
        self.target, self.predictor = copy.deepcopy(self.projected), _mlp(config.dim, config)
        self.module = nn.ModuleDict({"online": self.projected, "target": self.target, "predictor": self.predictor})
        self.step, self.steps = 0, config.epochs * -(-len(pairs) // (config.batch_size * config.accumulate))

    def loss(self, batch: Sequence[int]) -> Tensor:
        if self.step:
            update_target(self.target, self.projected, tau_at(self.step - 1, self.steps, self.config.momentum))
        self.step += 1
        views = self.views(batch)
        predicted = self.predictor(self.projected(views))
        with torch.no_grad():
            # Swap the halves, because the target is the other view.
            wanted = self.target(views).roll(len(batch), 0)
        return 2 * byol_loss(predicted, wanted)

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def _mlp(width: int, config: SiameseConfig) -> nn.Sequential:
    """Build a projector or predictor as published: linear, BatchNorm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(width, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.dim)
    )


_TASKS = {"simclr": SimCLRTask, "byol": BYOLTask}


def make_network(config: SiameseConfig, run: Run, number: int, *, weights: bool = True) -> Embedding:
    """Build the configured network with its weights, if any; other weights are random, drawn for `number`."""
    torch.manual_seed(seed_of(run.seed, 0, number))
    if weights and config.weights == "timm":
        network = _timm_network(config)
    else:
        path = find_weights(config.weights, config.mean, config.std) if weights else None
        network = build_pretrained(config.model, 2, config.channels, path)
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


def make_starts(siamese: Embedding, patches: PatchFiles, config: SiameseConfig, run: Run) -> dict[str, Embedding]:
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


def self_supervised(name: str, embedding: Embedding, pairs: Sliceable, config: SiameseConfig, run: Run) -> Embedding:
    """Train an embedding's encoder with "simclr" or "byol" on the patches (n, 2, C, h, w) of pairs, and return it.

    Epochs, steps, patches per step, rate and decay are those of the Siamese networks.
    """
    task = _TASKS[name](embedding, pairs, config, run.device)
    patches = 2 * config.batch_size * config.accumulate
    stage = config.stage(name, trainable=task.trainable, batch_size=patches, accumulate=1)
    run_stages(task, [stage], run.undealt())
    task.check_collapse()
    return embedding


def write_encoder(embedding: Embedding, folder: Path) -> None:
    """Write ``encoder.pt``: a state_dict of the backbone, for `create_model`."""
    state = embedding.maps.network.state_dict()
    save_torch(state, folder / "encoder.pt", "encoder")

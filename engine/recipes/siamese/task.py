"""Two networks that teach each other which pairs differ (co-teaching, as in DivideMix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ...errors import GigamorphError
from ...train.task import Task
from .augment import jittered, mirrored
from .config import SiameseConfig
from .judge import Judge
from .mixture import Mixture
from .network import Embedding, distance, soft_contrastive
from .patches import stacked
from .prefetch import Ahead

_BATCH = 128
_COLLAPSED = 1e-3  # of the embeddings' standard deviation, which is 1 / sqrt(dim) for evenly spread ones


class SiameseTask(Task):
    """Pairs of patches without labels.

    Before each epoch both networks measure all pairs, and each gets the soft labels that follow from the distances of
    the other. In the first epochs (warm-up) all contralateral pairs count as alike. Patches of different patients are
    always pairs that differ: without those, embeddings could become one point.

    Args:
        networks: one or two of equal build and different weights. One alone learns from its own labels.
        pairs: (n, 2, C, h, w), by index; left and right of one place.
        patients: of the pairs.
    """

    def __init__(
        self,
        networks: Sequence[Embedding],
        pairs: Sequence[Any] | Tensor,
        patients: Sequence[str],
        config: SiameseConfig,
        device: str = "cpu",
    ) -> None:
        self.module, self.pairs, self.config, self.device = nn.ModuleList(networks), pairs, config, device
        self.patients = np.unique(np.asarray(patients), return_inverse=True)[1]
        self.labels: list[Tensor] = [torch.zeros(len(pairs)) for _ in networks]
        """What each network learns from."""
        self.history: list[list[dict[str, float]]] = []
        """For each epoch and network: what `SiameseTask.begin_epoch` found."""
        self._ahead = Ahead(self._pairs, self._vary, device)

    def examples(self, epoch: int) -> Sequence[int]:
        return range(len(self.pairs))

    def ahead(self, batch: Sequence[int], seed: int) -> None:
        self._ahead.announce(batch, seed)

    def begin_epoch(self, epoch: int) -> None:
        if epoch < self.config.warm_up:
            return
        found = [self.measure(network) for network in self._networks()]
        self.history.append([{"epoch": epoch, **row} for _, row in found])
        for row in self.history[-1]:
            if row["embedding_std"] < _COLLAPSED:
                raise GigamorphError(
                    f"the embeddings have collapsed (standard deviation {row['embedding_std']:.1e}); raise negatives "
                    "or margin, or lower lr"
                )
        # Exchanged: what one network takes for different the other learns from.
        self.labels = [labels for labels, _ in found[::-1]]

    @torch.no_grad()
    def measure(self, network: Embedding) -> tuple[Tensor, dict[str, float]]:
        """Soft labels of all pairs by a network's distances, and their mixture; zeros where it has none."""
        d, deviation = self.distances(network)
        judge = Judge.fit(d, self.config)
        row = {**_told(judge.mixture), "embedding_std": deviation}
        return torch.from_numpy(judge.labels(d)).float(), row

    @torch.no_grad()
    def distances(self, network: Embedding) -> tuple[np.ndarray, float]:
        """Distances (n,) of all pairs, and the standard deviation of the embeddings, averaged over their values."""
        found, embedded = [], []
        count = len(self.pairs)
        for x in self._ahead.plain(range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)):
            e = network(x.flatten(0, 1)).unflatten(0, (-1, 2))
            found.append(distance(e[:, 0], e[:, 1]).double().cpu())
            embedded.append(e[:, 0].cpu())
        return torch.cat(found).numpy(), float(torch.cat(embedded).std(0).mean())

    def loss(self, batch: Sequence[int]) -> Tensor:
        x = self._ahead.varied(batch)
        others = self._others(batch)
        per_network, total = [], torch.zeros((), device=x.device)
        for network, labels in zip(self._networks(), self.labels, strict=True):
            e = network(x.flatten(0, 1)).unflatten(0, (-1, 2))
            d = distance(e[:, 0], e[:, 1])
            total = total + soft_contrastive(d, labels[list(batch)].to(d), self.config.margin)
            if len(others):
                apart = distance(e[others[:, 0], 0], e[others[:, 1], 1])
                negative = soft_contrastive(apart, torch.ones_like(apart), self.config.margin)
                total = total + self.config.negatives * negative
            per_network.append(d)
        if len(per_network) == 2:
            total = total + self.config.agreement * (per_network[0] - per_network[1]).square().mean()
        return total / len(per_network)

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "history": self.history}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels, self.history = state["labels"], state["history"]

    def _networks(self) -> list[Embedding]:
        return list(self.module)  # pyright: ignore[reportArgumentType, reportReturnType]

    def _pairs(self, indices: Sequence[int]) -> Tensor:
        return stacked(self.pairs, indices)

    def _others(self, batch: Sequence[int]) -> Tensor:
        """Places (m, 2) in the batch of two different patients, one pair for each place that has a partner."""
        patients = self.patients[list(batch)]
        order = torch.randperm(len(batch)).numpy()
        both = np.stack([order, np.roll(order, 1)], 1)
        return torch.from_numpy(both[patients[both[:, 0]] != patients[both[:, 1]]])

    def _vary(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """One mirroring for both patches of a pair; contrast, brightness and noise for each patch on its own."""
        return jittered(mirrored(x, generator), self.config.jitter, self.config.noise, generator)


def _told(mixture: Mixture) -> dict[str, float]:
    return {
        "mean_alike": mixture.means[0],
        "mean_different": mixture.means[1],
        "std_alike": mixture.deviations[0],
        "std_different": mixture.deviations[1],
        "share": mixture.share,
        "separated": float(mixture.separated),
    }

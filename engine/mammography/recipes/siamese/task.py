"""Two networks that teach each other which pairs differ (co-teaching, as in DivideMix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....errors import GigamorphError
from ....train.task import Task
from ..tensors import ReadAhead, Sliceable
from .config import SiameseConfig
from .mixture import Judge, Mixture
from .network import Embedding, distance, soft_contrastive
from .patches import jittered, mirrored

_BATCH = 128
_COLLAPSED = 1e-3  # minimal standard deviation of embeddings, which is 1 / sqrt(dim) if evenly spread


class SiameseTask(Task):
    """Training on pairs of patches without labels.

    Before each epoch both networks measure all pairs, and each gets the soft labels from the distances of the other. In
    the first epochs (warm-up) all contralateral pairs count as alike. Patches of different patients always count as
    different; otherwise the embeddings could collapse to one point.

    Args:
        networks: one or two of the same architecture with different weights. A single one learns from its own labels.
        pairs: (n, 2, C, h, w), by index; left and right at one location.
        patients: of the pairs.
    """

    def __init__(
        self,
        networks: Sequence[Embedding],
        pairs: Sliceable,
        patients: Sequence[str],
        config: SiameseConfig,
        device: str = "cpu",
    ) -> None:
        self.module, self.pairs, self.config, self.device = nn.ModuleList(networks), pairs, config, device
        self.patients = np.unique(np.asarray(patients), return_inverse=True)[1]
        self.labels: list[Tensor] = [torch.zeros(len(pairs)) for _ in networks]
        """The labels from which each network learns."""
        self.history: list[list[dict[str, float]]] = []
        """Results of `SiameseTask.begin_epoch` for each epoch and network."""
        self._ahead = ReadAhead(lambda indices: self.pairs[list(indices)])

    def examples(self, epoch: int) -> Sequence[int]:
        return range(len(self.pairs))

    def ahead(self, batch: Sequence[int]) -> None:
        self._ahead.announce(batch)

    def begin_epoch(self, epoch: int) -> None:
        if epoch < self.config.warm_up:
            return
        found = [self.measure(network) for network in self._networks()]
        self.history.append([{"epoch": epoch, **row} for _, row in found])
        for row in self.history[-1]:
            if row["embedding_std"] < _COLLAPSED:
                raise GigamorphError(
                    f"the embeddings have collapsed (standard deviation {row['embedding_std']:.1e}); increase "
                    "negatives or margin, or reduce lr"
                )
        # Exchanged: each network learns from the labels of the other.
        self.labels = [labels for labels, _ in found[::-1]]

    @torch.no_grad()
    def measure(self, network: Embedding) -> tuple[Tensor, dict[str, float]]:
        """Return soft labels of all pairs from a network's distances, and their mixture; zeros unless separated."""
        d, deviation = self.distances(network)
        judge = Judge.fit(d, self.config)
        row = {**_mixture_row(judge.mixture), "embedding_std": deviation}
        return torch.from_numpy(judge.labels(d)).float(), row

    @torch.no_grad()
    def distances(self, network: Embedding) -> tuple[np.ndarray, float]:
        """Return distances (n,) of all pairs, and the mean standard deviation of the embeddings' values."""
        found, embedded = [], []
        count = len(self.pairs)
        for x in self._ahead.each(range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)):
            e = network(x.to(self.device).flatten(0, 1)).unflatten(0, (-1, 2))
            found.append(distance(e[:, 0], e[:, 1]).double().cpu())
            embedded.append(e[:, 0].cpu())
        return torch.cat(found).numpy(), float(torch.cat(embedded).std(0).mean())

    def loss(self, batch: Sequence[int]) -> Tensor:
        x = self._vary(self._ahead.take(batch).to(self.device))
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

    def _others(self, batch: Sequence[int]) -> Tensor:
        """Return indices (m, 2) in the batch of two different patients, one pair for each sample with a partner."""
        patients = self.patients[list(batch)]
        order = torch.randperm(len(batch)).numpy()
        both = np.stack([order, np.roll(order, 1)], 1)
        return torch.from_numpy(both[patients[both[:, 0]] != patients[both[:, 1]]])

    def _vary(self, x: Tensor) -> Tensor:
        """Flip both patches of a pair equally; change contrast, brightness and noise of each patch independently."""
        return jittered(mirrored(x), self.config.jitter, self.config.noise)


def _mixture_row(mixture: Mixture) -> dict[str, float]:
    return {
        "mean_alike": mixture.means[0],
        "mean_different": mixture.means[1],
        "std_alike": mixture.deviations[0],
        "std_different": mixture.deviations[1],
        "share": mixture.share,
        "separated": float(mixture.separated),
    }

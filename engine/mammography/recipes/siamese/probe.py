"""Measures an encoder for patch classification with few labels: linear probe and fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ....errors import DataError
from ....evaluate.cases import Cases
from ....morph.running import eval_mode
from ....train.loop import run_stages
from ....train.run import Run, seed_of
from ..tensors import Sliceable, TensorTask, logits_of
from .config import SiameseConfig
from .network import Embedding
from .patches import PatchFiles, mirrored

_C = 0.01  # inverse strength of the penalty; few labels should give a direction, not a perfect fit
_MIRRORINGS = ((), (2,), (3,), (2, 3))  # axes of (N, C, h, w)


def patch_cases(patches: PatchFiles, y: Tensor, scores: NDArray[np.float64]) -> Cases:
    """Return predictions (log-odds, n) of patches with the truth (0 or 1, n), named by file and corner."""
    pairs = [(patches.files[f], side, cell) for f, (cell, side) in patches.places]
    own = [(file.pair.left, file.pair.right)[side] for file, side, _ in pairs]
    corners = [file.boxes[side][cell][:2] for file, side, cell in pairs]
    return Cases(
        outputs=("finding",),
        truth=y.double().numpy()[:, None],
        scores=scores[:, None],
        names=tuple(f"{r.path}#row={top:g}&column={left:g}" for r, (left, top) in zip(own, corners, strict=True)),
        patients=tuple(r.patient_id for r in own),
        exams=tuple(r.exam_id or "" for r in own),
        sides=tuple(r.laterality or "" for r in own),
    )


class LinearProbe(nn.Module):
    """The encoder of an embedding with a linear layer instead of the projection: patches -> logits of two classes."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.maps = copy.deepcopy(embedding.maps)
        self.fc = nn.Linear(embedding.project.in_features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)))


def _features(embedding: Embedding, x: Sliceable, axes: Sequence[int] = ()) -> Tensor:
    """Return features (n, channels) of patches flipped along some axes."""
    return logits_of(embedding, x, lambda part: embedding.features(part.flip(list(axes))))


def probed(embedding: Embedding, x: Sliceable, y: Tensor, test: Sliceable) -> NDArray[np.float64]:
    """Return log-odds (n,) of test patches from logistic regression on the frozen encoder's features.

    It is fitted to the four flips of each labelled patch, as in fine-tuning; test patches are not flipped.

    Raises:
        DataError: labelled patches have only one class.
    """
    if len(y.unique()) < 2:
        raise DataError("the labelled patches have only one class; a probe needs patches with and without a finding")
    with eval_mode(embedding):
        features = torch.cat([_features(embedding, x, axes) for axes in _MIRRORINGS]).numpy()
        others = _features(embedding, test).numpy()
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=2000))
    return model.fit(features, y.repeat(len(_MIRRORINGS)).numpy()).decision_function(others)


def fine_tuned(
    embedding: Embedding, x: Sliceable, y: Tensor, test: Sliceable, config: SiameseConfig, run: Run
) -> NDArray[np.float64]:
    """Return log-odds (n,) of test patches from a copy of the encoder that is fine-tuned on the labelled ones."""
    torch.manual_seed(seed_of(run.seed, 7))
    task = TensorTask(LinearProbe(embedding), x, y, vary=mirrored)
    few = {"epochs": config.probe_epochs, "batch_size": min(config.batch_size, 32), "accumulate": 1}
    stage = config.stage("fine-tune", **few, schedule="cosine")
    run_stages(task, [stage], run.undealt())
    logits = logits_of(task.module, test).double().numpy()
    return logits[:, 1] - logits[:, 0]

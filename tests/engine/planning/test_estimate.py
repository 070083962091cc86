"""The parts of a plan: what a GPU takes besides tensors."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gigamorph import plan
from gigamorph.engine.capture.trace import capture
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.planning import constants
from gigamorph.engine.planning.estimate import Estimate
from gigamorph.engine.tiling.stage import TiledStage


def test_scratch_of_a_gpu_is_counted():
    """Workspaces, trials of kernels and partial sums of the heaviest convolution of a tile; of a CPU none of them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.AdaptiveAvgPool2d(1))
    staged = lower(capture(model, (2, 3, 256, 256), torch.float32, "cpu"))
    tiles = [TiledStage(stage, (64, 64)) for stage in staged.stages]
    estimate = Estimate(staged, training=True, image_grad=False)
    estimate.image = dataclasses.replace(estimate.image, device=torch.device("cuda"))
    scratch = estimate._library(tiles, 1)
    pixels = 2 * 64 * 64 * 4
    heaviest = (8 + 2 * 64) * pixels
    sums = 4 * constants.WGRAD_SPLITS * 8 * 64
    assert scratch >= constants.GPU_LIBRARIES + heaviest + sums
    assert scratch <= constants.GPU_LIBRARIES + 1.2 * heaviest + sums, "not of the whole map"
    inference = Estimate(staged, training=False, image_grad=False)._library(tiles, 1)
    assert inference < constants.GPU_LIBRARIES


def test_linear_layers_and_keys_are_not_copied_as_kernels_are() -> None:
    """Of a transformer libraries copy the weights of its stem alone, however wide its layers and keys are."""
    blocks = nn.TransformerEncoderLayer(64, 2, 256, batch_first=True, dropout=0.0)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(1, 64, 8, 8), blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.stem(x).flatten(2).mT).mean(1)

    made = plan(Transformer(), (512, 512), tile=64)
    rest = 3 * constants.KERNEL_BYTES + constants.CODE_BYTES[True]
    assert made.library_bytes - rest <= 4 * 65 * 64  # of the stem's weights and biases

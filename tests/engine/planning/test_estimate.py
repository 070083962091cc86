"""The parts of a plan: what a GPU takes besides tensors."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from gigamorph import plan
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.planning import constants
from gigamorph.engine.planning.estimate import Estimator
from gigamorph.engine.tiling import stored_maps
from gigamorph.engine.tiling.memory import used_bytes
from gigamorph.engine.tiling.stage import TiledStage


def test_scratch_of_a_gpu_is_counted():
    """Workspaces, trials of kernels and partial sums of the heaviest convolution of a tile; of a CPU none of them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.AdaptiveAvgPool2d(1))
    staged = lower(capture(model, (2, 3, 256, 256), torch.float32, "cpu"))
    tiles = [TiledStage(stage, (64, 64)) for stage in staged.stages]
    estimate = Estimator(staged, training=True, image_grad=False)
    estimate.image = dataclasses.replace(estimate.image, device=torch.device("cuda"))
    scratch = estimate._library(tiles, 1)
    pixels = 2 * 64 * 64 * 4
    heaviest = (8 + 2 * 64) * pixels
    sums = 4 * constants.WGRAD_SPLITS * 8 * 64
    assert scratch >= constants.GPU_LIBRARIES + heaviest + sums
    assert scratch <= constants.GPU_LIBRARIES + 1.2 * heaviest + sums, "not of the whole map"
    inference = Estimator(staged, training=False, image_grad=False)._library(tiles, 1)
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


@pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped as Linux does")
def test_a_narrow_tile_of_a_map_in_a_file_is_counted_as_a_row_of_tiles() -> None:
    """The pages around each of its lines are mapped with them: up to all of the line, many times what it reads."""
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8)) for n in (1, 8)))
    staged = lower(capture(net.append(nn.AdaptiveAvgPool2d(1)), (1, 1, 512, 4096), torch.float32, "cpu"))
    staged.place = "disk"
    estimate, part = Estimator(staged, training=True, image_grad=False), 128 * 128 * 8 * 4
    counted = [estimate._cut(tile).away_bytes for tile in ((128, 128), (128, 4096))]
    assert counted[0] == counted[1] and max(counted[0]) >= 2 * 32 * part

    there = stored_maps.new_map(torch.ones(1, 8, 1, 1), (1, 8, 512, 4096), "disk", order=(0, 2, 3, 1))
    there.fill_(1)
    stored_maps.let_files_go([there])
    before = used_bytes()
    there[:, :, 256:384, 1024:1152].sum()
    assert 2 * part < used_bytes() - before < 1.1 * 32 * part

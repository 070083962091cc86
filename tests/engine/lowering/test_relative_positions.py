"""Logits of relative positions, made absolute by padding and reshaping: per position, in attention over all of them."""

from __future__ import annotations

import pytest
import torch
from attention_modules import Relative
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.cuda_graphs.signature import translates
from gigamorph.engine.lowering.relative_positions import column_runs
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.tiling.stage import TiledStage


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *middle, nn.Conv2d(4, 4, 3), *ends).double()


def image(height: int, width: int, n: int = 2) -> Tensor:
    return torch.randn(n, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=5)
@given(
    height=st.integers(3, 14),
    width=st.integers(3, 14),
    n=st.integers(1, 2),
    tile=st.tuples(st.integers(2, 16), st.integers(2, 16)),
)
def test_relative_positions(height, width, n, tile):
    model = network(Relative(4, height, width), nn.GELU(), Relative(4, height, width))
    assert_exact(model, image(height, width, n), tile=tile)


def test_scores_go_by_tile():
    """They have a row of 9 * 13 for each position; stored are a row and a column, from which logits are spread."""
    model = network(Relative(4, 9, 13))
    staged = lower(capture(model, (1, 2, 9, 13), torch.float64, torch.device("cpu")))
    scores = {v for v in staged.maps.axes if 9 * 13 in staged.maps.shape(v)}
    assert scores
    stored = {v for stage in staged.stages for v in stage.stored}
    assert not scores & stored
    assert sorted(staged.maps.shape(v).numel() // (2 * 9 * 13) for v in stored) == [2, 2, 2, 9, 13]


def test_no_tile_is_replayed_at_another_place():
    """Which columns a row keeps depends on where the row is."""
    staged = lower(capture(network(Relative(4, 12, 12)), (1, 2, 12, 12), torch.float64, torch.device("cpu")))
    kept = [stage for stage in staged.stages if any(local.op.name == "column_runs" for local in stage.locals)]
    assert len(kept) == 1
    assert not translates(TiledStage(kept[0], (4, 4)))


def test_botnet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomize(timm.create_model("botnet26t_256", img_size=(64, 96), num_classes=3)).double().eval()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    assert_exact(model, x, tile=48, inference=False)


def test_a_run_for_each_row():
    x = torch.arange(24.0).reshape(2, 3, 4)
    expected = torch.stack([x[:, i, start : start + 2] for i, start in enumerate((2, 0, 1))], 1)
    assert torch.equal(column_runs(x, (2, 0, 1), 2), expected)


class Moved(nn.Module):
    """A matrix of 5 columns for each position of a row, moved as its form says."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = (x.permute(0, 2, 3, 1) @ self.weight.T).reshape(-1, w, 5)
        if self.form == "columns":  # the same for each row
            y = F.pad(y, [1, 1])[:, :, 2:5]
        elif self.form == "rows below":  # each row gets columns of the next one
            y = F.pad(y.flatten(1)[:, 5:], [0, 5]).reshape(n * h, w, 5)[:, :, :3]
        elif self.form == "padding":  # some of which is read
            y = F.pad(y, [0, 1]).flatten(1).reshape(n * h, w, 6)[:, :, 3:6]
        elif self.form == "every other":
            y = F.pad(y, [0, 1]).flatten(1).reshape(n * h, w, 6)[:, :, 0:6:2]
        elif self.form == "filled by reflection":
            y = F.pad(F.pad(y, [0, 1], mode="reflect").flatten(1), [0, 4]).reshape(n * h, -1, 2)[:, :w]
            y = F.pad(y, [0, 1])
        else:  # others read what is in between
            middle = F.pad(y, [0, 1]).flatten(1)
            y = middle.reshape(n * h, w, 6)[:, :, :3] * middle.mean()
        return x[:, :3] + y.reshape(n, h, w, 3).permute(0, 3, 1, 2)


FORMS = ["columns", "rows below", "padding", "every other", "filled by reflection", "read in between"]


@pytest.mark.parametrize("form", FORMS)
def test_other_moves_are_right_or_refused(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Moved(form), nn.Conv2d(3, 2, 3)).double()
    x = image(9, 8)
    try:
        accelerate(model, tile=4)(x)
    except UnsupportedError as refusal:
        assert form != "columns"
        assert "needs the whole map" in str(refusal)
        assert_exact(model, x, tile=4, fallback="untiled")
    else:
        assert form not in ("rows below", "read in between")
        assert_exact(model, x, tile=4)


class Shifted(nn.Module):
    """The trick on the map's own rows and columns, whose values come to lie at other positions."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = F.pad(F.pad(x.reshape(-1, h, w), [0, 1]).flatten(1), [0, w - 1 - h % w]).flatten(1)
        return y[:, : h * w].reshape(n, c, h, w) + x


def test_positions_that_move_are_refused():
    model = network(Shifted())
    with pytest.raises(UnsupportedError):
        accelerate(model, tile=4)(image(9, 8))

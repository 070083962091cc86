"""Windows that the same positions of another map ask (GCViT's global queries)."""

import pytest
import torch
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.errors import UnsupportedError


class Asked(nn.Module):
    """What is pooled from all of an image asks each of its windows."""

    def __init__(self, window: int, how: str = "interleave"):
        super().__init__()
        self.window, self.how = window, how
        self.stem, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        s = self.window
        cells = x.view(n, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        pooled = F.avg_pool2d(x, (h // s, w // s)).flatten(2).transpose(1, 2)
        times = len(cells) // n
        if self.how == "interleave":
            asked = pooled.repeat_interleave(times, dim=0)
        elif self.how == "repeat":
            asked = pooled.repeat(times, 1, 1)
        elif self.how == "own":
            asked = pooled.repeat_interleave(times, 0) + torch.arange(len(cells), dtype=x.dtype)[:, None, None]
        else:
            asked = pooled.repeat_interleave(times, 0).view(-1, n, s * s, c).transpose(0, 1).reshape(-1, s * s, c)
        q, k, v = (F.linear(t, m) for t, m in zip((asked, cells, cells), self.qkv.weight.chunk(3), strict=True))
        heads = [t.view(-1, s * s, 2, c // 2).permute(0, 2, 1, 3) for t in (q * 0.5, k, v)]
        y = (heads[0] @ heads[1].transpose(-2, -1)).softmax(-1) @ heads[2]
        y = y.transpose(1, 2).reshape(n, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return self.last(y).mean((2, 3))


@settings(max_examples=5, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 4), st.integers(2, 3)),
    window=st.sampled_from([3, 4]),
    images=st.integers(1, 2),
    tile=st.sampled_from([5, (8, 6), 40]),
)
def test_global_queries(cells, window, images, tile):
    torch.manual_seed(0)
    x = torch.randn(images, 2, *(n * window for n in cells), dtype=torch.float64)
    assert_exact(Asked(window).double(), x, tile=tile)


def test_repeated_by_name_of_one_image():
    assert_exact(Asked(3, "repeat").double(), torch.randn(1, 2, 12, 9, dtype=torch.float64), tile=5)


@pytest.mark.parametrize("how", ["repeat", "own", "turned"])
def test_queries_that_differ_among_the_windows_of_an_image_are_refused(how):
    with pytest.raises(
        UnsupportedError, match=r"'matmul' cannot multiply windows by positions of another map|one value for each"
    ):
        accelerate(Asked(3, how).double(), tile=5)(torch.randn(2, 2, 12, 9, dtype=torch.float64))


def test_gcvit():
    gcvit = pytest.importorskip("timm.models.gcvit")
    torch.manual_seed(0)
    sizes = {"img_size": (64, 128), "depths": (2, 1, 2, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 4}
    model = gcvit.GlobalContextVit(**sizes, window_ratio=(32, 32, 16, 32), num_classes=3).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    assert_exact(model, torch.rand(2, 3, 64, 128, dtype=torch.float64), tile=48, inference=False)

"""`F.fold`: windows of a map put back, added where they overlap (VOLO's outlook attention)."""

import pytest
import torch
from around import Around
from exactness import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.errors import UnsupportedError

pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=9, deadline=None)
@given(
    kernel=pairs,
    stride=pairs,
    dilation=st.sampled_from([1, (2, 1)]),
    padding=st.sampled_from([0, (1, 2)]),
    tile=st.sampled_from([5, (7, 4)]),
)
def test_fold(kernel, stride, dilation, padding, tile):
    """Also where strides leave rows and columns between the windows that nothing reaches."""

    def windows_again(x):
        columns = F.unfold(x, kernel, dilation, padding, stride)
        return F.fold(columns.sigmoid(), x.shape[2:], kernel, dilation, padding, stride)

    assert_exact(Around(windows_again).double(), torch.randn(2, 2, 23, 19, dtype=torch.float64), tile=tile)


def test_columns_of_another_grid_are_refused():
    net = Around(lambda x: F.fold(x.flatten(2), x.shape[:1:-1], 1)).double()
    with pytest.raises(UnsupportedError, match=r"'fold' needs columns that are the positions of the image"):
        accelerate(net, tile=6)(torch.randn(1, 2, 14, 12, dtype=torch.float64))


def test_volo():
    """Outlook attention, attention over all positions, class attention, and classes of each position."""
    volo = pytest.importorskip("timm.models.volo")
    torch.manual_seed(0)
    sizes = {"layers": (1, 1, 1, 1), "img_size": (96, 112), "embed_dims": (8, 16, 16, 16), "num_heads": (2, 4, 4, 4)}
    model = volo.VOLO(**sizes, num_classes=3, stem_hidden_dim=8).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    assert_exact(model, torch.rand(1, 3, 96, 112, dtype=torch.float64), tile=48, inference=False)

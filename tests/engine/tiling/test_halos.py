"""Where halos are kept, and how windows are put together from them."""

import pytest
import torch
from torch.nn import functional as F

from gigamorph.engine.tiling.halos import HaloStore, Layout, cut, empty_like_layout


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64]
)
def test_store_gives_back_what_it_got(place, dtype):
    store = HaloStore(place)
    base = torch.randn(2, 3, 5, 7).mul(10).to(dtype)
    tensors = [
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(2, 3),
        base[:, :, 1:3],
        base[:, 1:2, :, ::2],
        base[:, :, :0],
        base[0, 0, 0, 0],
    ]
    handles = [store.put(t.clone() if place == "device" else t) for t in tensors]
    for tensor, handle in [*zip(tensors, handles, strict=True)][::-1]:
        back = store.get(handle)
        assert back.dtype == dtype and back.shape == tensor.shape
        assert torch.equal(back, tensor)
    assert store.bytes == sum(t.nbytes for t in tensors)


def test_store_on_disk_keeps_the_memory_order():
    store = HaloStore("disk")
    tensor = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    assert store.get(store.put(tensor)).is_contiguous(memory_format=torch.channels_last)


def test_store_on_disk_takes_no_memory_of_the_tensor():
    store = HaloStore("disk")
    tensor = torch.zeros(4)
    handle = store.put(tensor)
    tensor.fill_(1)
    assert store.get(handle).sum() == 0


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "permuted"])
def test_empty_like_layout(form):
    pattern = torch.randn(2, 3, 5, 7)
    if form == "channels_last":
        pattern = pattern.contiguous(memory_format=torch.channels_last)
    axes = (1, 2) if form == "permuted" else (2, 3)
    if form == "permuted":
        pattern = pattern.permute(0, 2, 3, 1)
    new = empty_like_layout(pattern, axes, 11, 13)
    assert (new.shape[axes[0]], new.shape[axes[1]]) == (11, 13)
    order = sorted(range(4), key=lambda d: -pattern.stride(d))
    assert sorted(range(4), key=lambda d: -new.stride(d)) == order
    assert new.numel() == new.untyped_storage().nbytes() // 4, "without gaps"


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 0, 2, 0), (0, 3, 0, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("fill", [0.0, float("-inf")])
def test_window_of_halos_and_block(pad, fill):
    whole = torch.randn(2, 3, 9, 8)
    rect = (2, 8, 1, 7)  # the window; rows before 4 come from above, columns before 3 from the left
    above, left, block = whole[:, :, 2:4], whole[:, :, 4:8, 1:3], whole[:, :, 4:8, 3:8]
    parts = [
        ((0, 2, 0, 6), above, (0, 2, 1, 7)),
        ((2, 6, 0, 2), left, (0, 4, 0, 2)),
    ]
    layout = Layout((2, 3), 6, 6, pad, fill, parts, ((2, 6, 2, 6), (0, 4, 0, 4)))
    expected = F.pad(cut(whole, (2, 3), rect), [pad[2], pad[3], pad[0], pad[1]], value=fill)
    assert torch.equal(layout.compose(block), expected)

"""Sources as one batch; lists of tensors and sources as one: an exam of several views."""

import numpy as np
import pytest
import torch
from exactness import LIMIT
from torch import Tensor, nn

from gigamorph import DataError, accelerate, open_pixels
from gigamorph.engine.images.batches import PixelBatch, as_batch, as_batches


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).double()


A, B = (torch.randn(1, 1, 37, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
LISTS = {
    "equal sizes": [A, B],
    "equal sizes, four": [A, B, A, B],
    "as a tuple": (A, B),
    "without a batch axis": [A[0], B[0]],
    "with one and without": [A, B[0]],
    "of several images": [torch.cat([A, B]), A],
    "of one": [A],
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_tensors_of_one_size_is_their_batch(name, frozen):
    images = LISTS[name]
    whole = torch.cat([one if one.dim() == 4 else one[None] for one in images])
    model, net = network(), accelerate(network(), tile=16)
    if frozen:
        model, net = model.eval(), net.eval()
    results = []
    for out, owner in ((model(whole), model), (net(images), net)):
        results.append([out, *torch.autograd.grad(out.square().sum(), list(owner.parameters()))])
    for stock, found in zip(*results, strict=True):
        torch.testing.assert_close(found, stock, rtol=LIMIT, atol=LIMIT)


def test_gradients_reach_every_image_of_a_list():
    views = [A.clone().requires_grad_(), B[0].clone().requires_grad_()]
    (accelerate(network(), tile=16).eval())(views).sum().backward()
    assert all(isinstance(view.grad, Tensor) and view.grad.abs().sum() > 0 for view in views)


def test_images_of_several_sizes_without_a_batch_axis():
    net, other = accelerate(network(), tile=16).eval(), torch.randn(1, 21, 40, dtype=torch.float64)
    found = net([A[0], other])
    torch.testing.assert_close(found, torch.cat([net(A), net(other[None])]), rtol=0, atol=0)


def test_sources_and_tensors_of_one_size_in_one_list():
    source = open_pixels(np.arange(37 * 29, dtype=np.uint16).reshape(37, 29))
    net = accelerate(network().float(), tile=16).eval()
    tensor = A.float()
    with torch.no_grad():
        expected = torch.cat([net(source), net(tensor)])
        for views in ([source, tensor], [source, tensor[0]]):
            torch.testing.assert_close(net(views), expected, rtol=0, atol=0)


def test_batch_of_sources():
    grey = np.random.default_rng(0).integers(0, 65536, (151, 117), dtype=np.uint16)
    sources = [open_pixels(grey), open_pixels(grey, flip=True)]
    batch = as_batch(sources)
    assert isinstance(batch, PixelBatch)
    assert batch.shape == (2, 1, 151, 117)
    region = batch.read(3, 20, 5, 30)
    assert torch.equal(region, torch.stack([source.read(3, 20, 5, 30) for source in sources]))
    assert as_batch(batch) is batch
    single = as_batch(sources[0])
    assert isinstance(single, PixelBatch)
    assert single.shape == (1, 1, 151, 117)
    tensor = torch.zeros(2, 3, 4, 5)
    assert as_batch(tensor) is tensor
    with pytest.raises(DataError, match=r"images of one batch differ in size .*\(1, 151, 117\), \(3, 101, 77\)"):
        as_batch([sources[0], open_pixels(np.zeros((101, 77, 3), np.uint8))])
    for wrong in ([], grey, "x.png", None):
        with pytest.raises(DataError):
            as_batch(wrong)  # pyright: ignore[reportArgumentType]


BAD = {
    "a batch needs at least one image": [],
    "got ndarray as item 1": [A, np.zeros((3, 3))],
    r"as item 0 has shape \(37, 29\); it must be \(C, H, W\)": [A[0, 0], B],
    r"dtypes torch\.float32, torch\.float64; pass one": [A, B.float()],
    r"dtypes torch\.float32, torch\.float64; pass": [A, B.float()[..., :20]],
}


@pytest.mark.parametrize("message", BAD)
def test_lists_that_are_no_batch(message):
    with pytest.raises(DataError, match=message):
        as_batches(BAD[message])


def test_where_images_must_be_of_one_size():
    with pytest.raises(DataError, match=r"differ in size or kind: \(1, 37, 29\), \(1, 37, 20\)"):
        as_batch([A, B[..., :20]])

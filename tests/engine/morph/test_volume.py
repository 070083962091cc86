"""child(v) computes each slice of a volume as its parent computes an image."""

import copy

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import create_model
from gigamorph.engine.errors import MorphError
from gigamorph.engine.morph.kernel_size import grow_kernel
from gigamorph.engine.morph.step import from_json, to_json
from gigamorph.engine.morph.volume import to_volume


def slices(parent: nn.Module, volume: Tensor) -> Tensor:
    """The outputs of the parent, with the slices as dimension 2, or their mean if they are vectors."""
    results = [parent(volume[:, :, d]) for d in range(volume.shape[2])]
    return torch.stack(results).mean(0) if results[0].dim() == 2 else torch.stack(results, 2)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    kernel, stride = draw(st.tuples(*2 * [st.integers(1, 4)])), draw(st.integers(1, 2))
    padding = tuple(k // 2 for k in kernel)
    made = [
        lambda: nn.Conv2d(4, 4, kernel, stride, padding, padding_mode=draw(st.sampled_from(["zeros", "replicate"]))),
        lambda: nn.Conv2d(4, 4, kernel, padding="same", dilation=(1, 2), groups=2, bias=False),
        lambda: nn.ConvTranspose2d(4, 4, kernel, 2, output_padding=1),
        lambda: nn.MaxPool2d(kernel, stride, padding, ceil_mode=True),
        lambda: nn.AvgPool2d(kernel, stride, padding, count_include_pad=draw(st.booleans())),
        *(
            lambda: nn.BatchNorm2d(4),
            lambda: nn.InstanceNorm2d(4, affine=True),
            lambda: nn.GroupNorm(2, 4),
            lambda: nn.Dropout2d(),
            nn.GELU,
        ),
        lambda: nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(["nearest", "bilinear"]))),
        *(lambda: nn.ZeroPad2d((1, 0, 2, 1)), lambda: nn.ReflectionPad2d(1), lambda: nn.ConstantPad2d(1, 0.5)),
        *(lambda: nn.ReplicationPad2d((0, 2, 1, 1)), lambda: nn.AdaptiveAvgPool2d((3, 4))),
    ]
    return draw(st.sampled_from(made))()


@settings(max_examples=40, deadline=None)
@given(st.lists(layers(), max_size=5), st.booleans(), st.integers(0, 99))
def test_random_networks(body: list[nn.Module], pooled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)] if pooled else []
    parent = randomize(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *body, *head)).double().eval()
    before = copy.deepcopy(parent.state_dict())
    child, report = to_volume(parent, torch.rand(1, 1, 24, 20, dtype=torch.float64))
    volume = torch.randn(2, 1, 5, 24, 20, dtype=torch.float64)
    assert relative(child(volume), slices(parent, volume)) < 1e-12 and report.difference.float64 < 1e-12
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "unet", "timm:efficientnet_b0"])
def test_networks_grow_a_depth_and_run_by_tiles(name: str) -> None:
    parent = randomize(create_model(name, num_classes=2, in_channels=1)).double().eval()
    child, report = to_volume(parent, torch.rand(1, 1, 64, 64, dtype=torch.float64))
    volume = torch.randn(1, 1, 3, 64, 96, dtype=torch.float64)
    expected = slices(parent, volume)
    assert relative(child(volume), expected) < 1e-12
    path = next(path for path, module in child.named_modules() if isinstance(module, nn.Conv3d))
    kernel = child.get_submodule(path).kernel_size
    deep, _ = grow_kernel(child, volume, path, (3, *kernel[1:]))  # pyright: ignore[reportGeneralTypeIssues, reportIndexIssue]
    assert relative(deep(volume), expected) < 1e-12
    with torch.no_grad():
        deep.get_submodule(path).weight.add_(0.1)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert relative(deep(volume), expected) > 1e-6, "slices are mixed now"
    if name in ("resnet18", "unet"):
        assert_exact(deep, volume, tile=32)
    again = from_json(to_json(report.step)).repeat(copy.deepcopy(parent))
    again.load_state_dict(child.state_dict())
    assert torch.equal(again.eval()(volume), child(volume))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)), "not linear"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Upsample((20, 20))), "scale_factor"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.LPPool2d(2, 2)), "volume: "),
        (nn.Sequential(nn.Flatten(), nn.Linear(24 * 20, 2)), "no layer for images"),
    ],
)
def test_what_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(MorphError, match=message):
        to_volume(network.double(), torch.rand(2, 1, 24, 20, dtype=torch.float64))
    with pytest.raises(MorphError, match="one image batch"):
        to_volume(network, torch.rand(2, 1, 5, 24, 20))

"""end2end: published sizes, the conversion of the patch network, its variants."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gigamorph.engine.accelerate import accelerate
from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes.end2end.config import End2EndConfig, Model, TopBlock
from gigamorph.engine.mammography.recipes.end2end.network import PatchNet, WholeNet, convert, features, top_blocks

NET = "gigamorph.engine.mammography.recipes.end2end.synthetic:SmallNet"
MODELS = (
    Model("a", NET, "random", blocks=(TopBlock("residual", 4, 1, 2),)),
    Model("b", NET, "random", blocks=(TopBlock("vgg", 4),), heatmap=True, heatmap_pool=(2, 1)),
)


def shapes(net, x):
    """Sizes of the maps on the way, on the meta device."""
    found = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, tuple(o.shape[1:])))
    net(x)
    return found


@pytest.mark.parametrize(
    ("blocks", "after", "count"),
    [
        ((TopBlock("residual", 512, 1, 4),) * 2, [(2048, 18, 14), (2048, 9, 7)], None),
        ((TopBlock("residual", 512, 2, 2),) * 2, [(1024, 18, 14), (1024, 9, 7)], None),
        (
            (TopBlock("vgg", 512, 1), TopBlock("vgg", 512, 1)),
            [(512, 18, 14), (512, 9, 7)],
            9 * 2048 * 512 + 9 * 512 * 512 + 2 * 512 + 4 * 512,
        ),
    ],
)
def test_published_sizes_of_the_whole_image_network(blocks, after, count):
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        net = convert(patch, Model(blocks=blocks)).eval()
        found = shapes(net, torch.empty(1, 3, 1152, 896))
    assert found["features"] == (2048, 36, 28) and found[""] == (2,)
    each = [size[1:] for name, size in found.items() if name.startswith("top.") and name.count(".") == 1]
    assert list(dict.fromkeys(each)) in ([(18, 14), (9, 7)], [(36, 28), (18, 14), (9, 7)])
    assert found["top"] == after[-1]
    assert sum(p.numel() for p in net.features.parameters()) == 23_508_032  # ResNet-50 without its classifier
    if count is not None:
        assert sum(p.numel() for p in net.top.parameters()) == count


def test_published_sizes_of_the_heat_map_variant():
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        net = convert(patch, Model(heatmap=True)).eval()
        found = shapes(net, torch.empty(1, 3, 1152, 896))
    assert found["heatmap.mean"] == (2048, 30, 22) and found["heatmap.classes"] == (5, 30, 22)
    assert found["heatmap.pool"] == (5, 6, 4)


def test_bottleneck_parameters():
    """[512-512-2048] on 2048 maps: three convolutions and a projection with biases, four norms."""
    top, width = top_blocks(2048, [TopBlock("residual", 512, 1, 4)])
    convs = 2048 * 512 + 512 + 9 * 512 * 512 + 512 + 512 * 2048 + 2048 + 2048 * 2048 + 2048
    assert width == 2048 and sum(p.numel() for p in top.parameters()) == convs + 2 * (512 + 512 + 2048 + 2048)


def test_heat_map_is_the_patch_classifier_at_every_place():
    torch.manual_seed(0)
    patch = PatchNet(features("resnet18", 1), 512).double().eval()
    net = convert(patch, Model(blocks=(TopBlock("vgg", 4),), heatmap=True, heatmap_pool=(2, 2))).eval()
    x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
    maps = patch.features(x)
    want = F.linear(F.avg_pool2d(maps, 2, 1).movedim(1, -1), patch.head[-1].weight, patch.head[-1].bias).movedim(-1, 1)
    got = net.heatmap.classes(net.heatmap.mean(net.features(x)))
    assert (got - want).abs().max() < 1e-12
    # A patch of one window of the maps is classified alike.
    assert (patch.head(F.avg_pool2d(maps, 2, 1)[:, :, 0, 0]) - got[:, :, 0, 0]).abs().max() < 1e-12
    net.features[0].weight.data.zero_()
    assert patch.features[0].weight.abs().sum() > 0  # the patch network keeps its own


def test_networks_of_timm():
    pytest.importorskip("timm")
    maps = features("timm:vgg16", 3).eval()
    with torch.no_grad():
        assert maps(torch.zeros(1, 3, 64, 96)).shape == (1, 512, 2, 3)
    assert sum(p.numel() for p in maps.parameters()) == 14_714_688  # VGG-16 without its classifier
    with pytest.raises(GigamorphError, match="does not define its features"):
        features("lesionnet", 1)


def test_whole_networks_run_in_tiles():
    """The converted network through `accelerate`, in a budget, is the network itself."""
    torch.manual_seed(0)
    for model in MODELS:
        net = convert(PatchNet(features(NET, 1), 32), model).double().eval()
        assert isinstance(net, WholeNet)
        x = torch.randn(1, 1, 160, 128, dtype=torch.float64)
        assert (accelerate(net, tile=(64, 64))(x) - net(x)).abs().max() < 1e-12


def test_fully_connected_layers_on_the_heat_map():
    """The poster's rows: heat map, max-pooling 5 x 5, layers of 64 and 32, and the shortcut past them."""
    with torch.device("meta"):
        patch = PatchNet(features("resnet50", 3), 2048)
        model = Model(blocks=(), heatmap=True, fc=(64, 32), shortcut=True)
        net = convert(patch, model, (1152, 896)).eval()
        assert net(torch.empty(1, 3, 1152, 896)).shape == (1, 2)
    assert [layer.in_features for layer in net.top.layers if isinstance(layer, torch.nn.Linear)] == [120, 64]
    assert net.top.shortcut.in_features == 6 * 4 * 5
    torch.manual_seed(0)
    maps = PatchNet(features(NET, 1), 32)
    net = convert(maps, replace(model, heatmap_pool=(2, 2)), (64, 48), 1).double().eval()
    x = torch.randn(2, 1, 64, 48, dtype=torch.float64)
    flat = net.heatmap(net.features(x)).flatten(1)
    want = net.head(net.top.layers(flat)) + flat @ net.top.shortcut.weight.T + net.top.shortcut.bias
    assert (net(x) - want).abs().max() < 1e-12
    assert (accelerate(net, tile=(32, 32))(x) - want).abs().max() < 1e-12
    with pytest.raises(GigamorphError, match=r"fc needs blocks = \[\] and images of one size"):
        End2EndConfig(models=(replace(model, blocks=(TopBlock("vgg", 4),)),))
    with pytest.raises(GigamorphError, match="shortcut bypasses fully connected layers"):
        End2EndConfig(models=(Model(shortcut=True),))

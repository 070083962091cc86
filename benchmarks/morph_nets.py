"""Networks for the table of morphs, with random weights, and an input on which their rounding is well-conditioned."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # `exactness`, as the tests import it

TIMM = """
    edgenext_xx_small regnetx_002 starnet_s1 regnety_002 cs3darknet_s mobilenetv2_100 convnext_atto convnextv2_atto
    mobilenetv4_conv_small fasternet_t0 mobilenetv1_100 inception_next_atto mnasnet_100 efficientnet_lite0 ghostnet_100
    mobileone_s0 efficientnet_b0 mobilenetv3_large_100 fbnetc_100 hgnetv2_b0 tf_efficientnetv2_b0 densenet121 gernet_s
    dpn48b repvgg_a0 resnet18 resnetblur18 poolformer_s12 hrnet_w18_small dla34 nf_resnet26 seresnext26d_32x4d
""".split()
LARGE = (
    "skresnet18 resnest14d eca_resnet33ts resnet50 resnext50_32x4d res2net50_26w_4s resnetv2_50 inception_v3".split()
)
OPTIONS: dict[str, dict[str, Any]] = {  # what the default would make too large or tie to one image size
    "vgg11_bn": {"mlp_ratio": 1 / 16},
    "vit_tiny_patch16_224": {"img_size": 96},
    "swin_tiny_patch4_window7_224": {"img_size": 112, "embed_dim": 48, "depths": (2, 2, 2, 2)},
}
NETWORKS = [
    *(f"own:{name}" for name in ("lesionnet", "unet_t", "unet_i", "fpn", "flatten", "resnet18")),
    *(f"tv:{name}" for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet")),
    *OPTIONS,
    *TIMM,
    *LARGE,
]
INPUTS = [(side, batch) for batch in (2, 18) for side in (64, 96, 112, 128, 160)]  # the first that will do
LEAST_MAP = 9  # pixels of the smallest map of a convolution, those on pooled values aside
LEAST_VALUES = 18  # per channel, of which a BatchNorm in train mode computes its statistics


def build(name: str) -> nn.Module:
    """The network of a name, in float32; no parameter is zero, so that a lost one is seen."""
    from exactness import randomize

    from gigamorph.engine.models.compat import make_torchvision_importable

    make_torchvision_importable()
    torch.manual_seed(0)
    source, _, rest = name.rpartition(":")
    model: Any
    if source == "own":
        model = _own()[rest]()
    elif source == "tv":
        import torchvision

        quiet = {"init_weights": False, "aux_logits": False} if rest == "googlenet" else {}
        model = torchvision.models.get_model(rest, weights=None, **quiet)
    else:
        import timm

        model = timm.create_model(rest, pretrained=False, **OPTIONS.get(rest, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return randomize(model).eval()


def _own() -> dict[str, Callable[[], nn.Module]]:
    import coverage_nets

    from gigamorph.engine.models import create_model

    return {
        "lesionnet": lambda: create_model("lesionnet", in_channels=3),
        "resnet18": lambda: create_model("resnet18", in_channels=3),
        "flatten": flatten_net,
        **coverage_nets.NETWORKS,
    }


def flatten_net() -> nn.Module:
    """A chain of convolutions whose last map is flattened into linear layers, as in AlexNet and VGG."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(48 * 36, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


def example(model: nn.Module) -> Tensor:
    """An image batch of zeros of the first size in INPUTS that the network takes and that is well-conditioned.

    With few values behind each batch statistic, rounding is magnified without bound: two values per channel are
    normalised to +1 and -1, whatever their difference.
    """
    for side, batch in INPUTS:
        x = torch.zeros(batch, 3, side, side)
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            if _well_conditioned(model, x):
                return x
    raise RuntimeError(f"no image of {[side for side, _ in INPUTS]} pixels will do")


def _well_conditioned(model: nn.Module, x: Tensor) -> bool:
    good = True

    def look(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        nonlocal good
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            good &= args[0].numel() // args[0].shape[1] >= LEAST_VALUES
        elif result.ndim == 4 and result.shape[2:].numel() > 1:
            good &= result.shape[2:].numel() >= LEAST_MAP

    look_at(model, x, (nn.Conv2d, nn.modules.batchnorm._BatchNorm), look)
    return good


def look_at(model: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...], look: Callable[..., None]) -> None:
    """Run the model, with `look(module, args, result)` for every module of some kinds, in the order of the forward."""
    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()

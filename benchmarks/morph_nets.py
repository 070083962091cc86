"""Networks for the table of morphs, with random weights, and an input with well-conditioned rounding."""

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
OPTIONS: dict[str, dict[str, Any]] = {  # smaller variants, or variants for another image size
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
INPUTS = [(side, batch) for batch in (2, 18) for side in (64, 96, 112, 128, 160)]  # the first valid one is used
LEAST_MAP = 9  # minimum pixels of a convolution's map, except maps of pooled values
LEAST_VALUES = 18  # minimum values per channel for the statistics of a BatchNorm in train mode


def build(name: str) -> nn.Module:
    """Build the network of a name in float32; no parameter is zero, so that a lost parameter is visible."""
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
    """Build a chain of convolutions with flattened output and linear layers, as in AlexNet and VGG."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(48 * 36, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


def example(model: nn.Module) -> Tensor:
    """Return a batch of zeros of the first size in INPUTS that the network accepts and that is well-conditioned.

    With few values per batch statistic, rounding is magnified without bound: two values per channel are normalised to
    +1 and -1 for any difference.
    """
    for side, batch in INPUTS:
        x = torch.zeros(batch, 3, side, side)
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            if _well_conditioned(model, x):
                return x
    raise RuntimeError(f"the network accepts no well-conditioned image of {[side for side, _ in INPUTS]} pixels")


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
    """Run the model and call `look(module, args, result)` for every module of some kinds, in forward order."""
    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()

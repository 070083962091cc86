"""Whether networks of other libraries than timm and torchvision are exact, unmodified: smp, MONAI, transformers.

    pip install segmentation-models-pytorch monai einops transformers
    python benchmarks/other_libraries.py --json benchmarks/results/other_libraries.json
    python benchmarks/other_libraries.py --only smp --json FILE

A row is one network with random weights at a small size, by tiles of 32, with frozen and with live norms: outputs and
all gradients against stock PyTorch in float64, judged as in `coverage.py`. Its verdicts are those of the census. Random
numbers are switched off. What is not installed is left out; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]
from coverage_judge import judge  # noqa: E402
from exactness import randomize  # noqa: E402

from gigamorph import GigamorphError, accelerate  # noqa: E402
from gigamorph.engine.bench.machine import provenance  # noqa: E402
from gigamorph.engine.models.compat import make_torchvision_importable  # noqa: E402

TILE, LIMIT = 32, 1e-12
SIZE, SQUARE = (128, 160), 128  # those that take squares alone are listed below
SQUARES = ("transformers Pvt", "transformers Dinov2")
Build = Callable[[], nn.Module]


def smp() -> Iterator[tuple[str, Build]]:
    import segmentation_models_pytorch as smp

    decoders = "Unet UnetPlusPlus FPN PSPNet DeepLabV3 DeepLabV3Plus Linknet MAnet PAN UPerNet".split()
    encoders = "efficientnet-b0 mobilenet_v2 vgg11_bn dpn68 mit_b0 tu-convnext_atto".split()
    for name in decoders:
        yield name, lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None, classes=2)
    for name in encoders:
        yield f"Unet {name}", lambda name=name: smp.Unet(name, encoder_weights=None, classes=2)
    yield "Unet scse", lambda: smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse")
    yield "Unet aux", lambda: smp.Unet("resnet18", encoder_weights=None, aux_params={"classes": 3})
    yield "Segformer", lambda: smp.Segformer("mit_b0", encoder_weights=None, classes=2)


def monai() -> Iterator[tuple[str, Build]]:
    import monai.networks.nets as nets

    few, steps = (8, 16, 32), (2, 2)
    yield "UNet", lambda: nets.UNet(2, 3, 2, few, steps, num_res_units=1)
    yield "UNet batch", lambda: nets.UNet(2, 3, 2, few, steps, num_res_units=2, norm="batch")
    yield "AttentionUnet", lambda: nets.AttentionUnet(2, 3, 2, few, steps)
    yield "BasicUNet", lambda: nets.BasicUNet(2, 3, 2, (8, 8, 16, 16, 32, 8))
    yield "BasicUNetPlusPlus", lambda: nets.BasicUNetPlusPlus(2, 3, 2, (8, 8, 16, 16, 32, 8))
    yield "SegResNet", lambda: nets.SegResNet(2, 8, 3, 2)
    yield "SegResNetDS", lambda: nets.SegResNetDS(2, 8, 3, 2)
    yield "DynUNet", lambda: nets.DynUNet(2, 3, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=list(few))
    yield "FlexibleUNet", lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", spatial_dims=2, pretrained=False)
    yield "MedNeXt", lambda: nets.MedNeXt(2, 8, 3, 2)
    yield "DenseNet121", lambda: nets.DenseNet121(2, 3, 2)
    yield "SEResNet50", lambda: nets.SEResNet50(spatial_dims=2, in_channels=3, num_classes=2)
    yield "resnet18", lambda: nets.resnet18(spatial_dims=2, n_input_channels=3, num_classes=2)
    yield "EfficientNetBN", lambda: nets.EfficientNetBN("efficientnet-b0", False, True, 2, 3, 2)
    vit: dict[str, Any] = {"hidden_size": 96, "mlp_dim": 128, "num_heads": 4, "spatial_dims": 2}
    yield "UNETR", lambda: nets.UNETR(3, 2, SIZE, feature_size=8, **vit)
    yield "SwinUNETR", lambda: nets.SwinUNETR(3, 2, feature_size=12, spatial_dims=2)
    yield "ViT", lambda: nets.ViT(3, SIZE, 16, num_layers=2, classification=True, num_classes=2, **vit)
    yield "AutoEncoder", lambda: nets.AutoEncoder(2, 3, 2, (8, 16), steps)


def transformers() -> Iterator[tuple[str, Build]]:
    import transformers

    stages: dict[str, Any] = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    heads = {"num_attention_heads": [1, 2, 4, 8]}
    tokens: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = SIZE
    windows: dict[str, Any] = {"image_size": size, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]}
    settings: dict[str, dict[str, Any]] = {
        "ResNet": {**stages, "embedding_size": 8},
        "RegNet": {**stages, "embedding_size": 8, "groups_width": 8},
        "ConvNext": stages,
        "ConvNextV2": stages,
        "MobileNetV1": {"depth_multiplier": 0.25},
        "MobileNetV2": {"depth_multiplier": 0.35},
        "EfficientNet": {"width_coefficient": 0.35, "depth_coefficient": 0.5, "hidden_dim": 448},
        "PoolFormer": stages,
        "FocalNet": {"embed_dim": 12, "depths": [1, 1, 1, 1], "image_size": size},
        "Pvt": {**stages, **heads, "image_size": SQUARE},
        "PvtV2": {**stages, **heads},
        "Segformer": {**stages, "decoder_hidden_size": 32},
        "Swin": {**windows, "window_size": 4},
        "Swinv2": {**windows, "window_size": 4},
        "ViT": {**tokens, "image_size": size, "intermediate_size": 64},
        "Dinov2": {**tokens, "image_size": SQUARE, "patch_size": 16},
        "Beit": {**tokens, "image_size": size, "intermediate_size": 64},
    }

    def build(name: str) -> nn.Module:
        task = "ForSemanticSegmentation" if name == "Segformer" else "ForImageClassification"
        config = getattr(transformers, f"{name}Config")(**settings[name])
        return getattr(transformers, name + task)(config)

    for name in settings:
        yield name, lambda name=name: build(name)


SOURCES = {
    "smp": ("segmentation_models_pytorch", smp),
    "monai": ("monai", monai),
    "transformers": ("transformers", transformers),
}


def networks() -> Iterator[tuple[str, Build]]:
    """Those of the libraries that are installed."""
    make_torchvision_importable()
    for source, (package, own) in SOURCES.items():
        if importlib.util.find_spec(package) is not None:
            yield from ((f"{source} {name}", build) for name, build in own())


def check(build: Build, live: bool, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """The verdict on one network."""
    torch.manual_seed(0)
    model = randomize(build()).double().train(live)
    _without_random_numbers(model)
    image = torch.randn(2 if live else 1, 3, *size, dtype=torch.float64)
    found: dict[str, Any] = {}
    for fallback in (None, "whole"):
        fast = lambda twin, fallback=fallback: accelerate(twin, tile=TILE, fallback=fallback)  # noqa: E731
        try:
            found |= judge(model, image, fast, casts=False, limit=LIMIT)
        except GigamorphError as refusal:
            found["message"] = str(refusal)
            continue
        good, unclear = found.pop("good"), found.pop("unclear")
        exact = "exact" if fallback is None else "taken whole"
        return found | {"verdict": exact if good else "unclear" if unclear else "wrong"}
    return found | {"verdict": "refused"}


def _without_random_numbers(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--json", type=Path, help="the file that rows are appended to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    done = {(row["network"], row["norms"]) for row in rows}
    for name, build in networks():
        for norms in ("frozen", "live"):
            if (name, norms) in done or not any(part in name for part in options.only):
                continue
            try:
                row = check(build, norms == "live", (SQUARE, SQUARE) if name in SQUARES else SIZE)
            except Exception as error:  # whatever a network raises is its verdict
                row = {"verdict": "wrong", "message": f"{type(error).__name__}: {error}"}
            rows.append({"network": name, "norms": norms, **row})
            error = f"{row['error']:.1e}" if "error" in row else ""
            print(f"{name:32} {norms:6} {row['verdict']:11} {error:8} {row.get('message', '')[:150]}", flush=True)
            if options.json:
                packages = (package for package, _ in SOURCES.values() if importlib.util.find_spec(package))
                there = {package: version(package.replace("_", "-")) for package in packages}
                what = {"what": "benchmarks/other_libraries.py", "libraries": there, "provenance": provenance()}
                options.json.write_text(json.dumps({**what, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks whether networks of libraries other than timm and torchvision are exact, unmodified.

    pip install segmentation-models-pytorch monai einops transformers vit-pytorch dynamic-network-architectures \\
        open_clip_torch torchxrayvision efficientnet_pytorch pretrainedmodels ultralytics
    python benchmarks/other_libraries.py --json benchmarks/results/other_libraries.json
    python benchmarks/other_libraries.py --only smp --json FILE

A row is one network with random weights at a small size, in tiles of 32, with frozen and with live norms: outputs and
all gradients against stock PyTorch in float64, judged as in `coverage.py`, with the verdicts of the census. Random
numbers are disabled. Libraries that are not installed are skipped; existing rows are not computed again, and each has
the commit of its measurement. A source is a package and a function that yields names and constructors of small
networks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)]
from coverage_judge import judge  # noqa: E402
from exactness import randomize  # noqa: E402

from gigamorph import GigamorphError, accelerate  # noqa: E402
from gigamorph.engine.bench.machine import provenance  # noqa: E402
from gigamorph.engine.models.compat import make_torchvision_importable  # noqa: E402

TILE, LIMIT = 32, 1e-12
SIZE, SQUARE = (128, 160), 128
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


def vit_pytorch() -> Iterator[tuple[str, Build]]:
    few: dict[str, Any] = {"num_classes": 3, "dim": 32, "heads": 2, "mlp_dim": 48, "patch_size": 16}
    wide, square = {**few, "depth": 2, "image_size": SIZE}, {**few, "depth": 2, "image_size": SQUARE}
    stages: dict[str, Any] = {"num_classes": 3, "dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)}
    twins = {f"s{n}_emb_dim": dim for n, dim in zip((1, 2, 3, 4), (16, 16, 32, 32), strict=True)}
    twins |= {f"s{n}_local_patch_size": size for n, size in zip((1, 2, 3, 4), (4, 4, 4, 2), strict=True)}
    twins |= {f"s{n}_global_k": k for n, k in zip((1, 2, 3, 4), (4, 4, 2, 1), strict=True)}
    settings: dict[tuple[str, str], dict[str, Any]] = {
        ("vit", "ViT"): wide,
        ("simple_vit", "SimpleViT"): wide,
        ("simple_vit_with_register_tokens", "SimpleViT"): wide,
        ("simple_vit_with_qk_norm", "SimpleViT"): wide,
        ("simple_vit_with_fft", "SimpleViT"): {**wide, "freq_patch_size": 16},
        ("deepvit", "DeepViT"): square,
        ("cait", "CaiT"): {**square, "cls_depth": 1},
        ("parallel_vit", "ViT"): wide,
        ("vit_for_small_dataset", "ViT"): square,
        ("vit_with_patch_merger", "ViT"): wide,
        ("normalized_vit", "nViT"): wide,
        ("xcit", "XCiT"): {**square, "cls_depth": 1},
        ("pit", "PiT"): {**square, "depth": (1, 1)},
        ("rvt", "RvT"): square,
        ("cct", "CCT"): {"img_size": SIZE, "embedding_dim": 32, "n_conv_layers": 2, "num_layers": 2, "num_heads": 2,
                         "mlp_ratio": 2, "num_classes": 3, "kernel_size": 3, "stride": 2, "padding": 1},
        ("cvt", "CvT"): {"num_classes": 3, "s1_emb_dim": 16, "s2_emb_dim": 16, "s2_heads": 2, "s3_emb_dim": 32,
                         "s3_heads": 2, "s3_depth": 1},
        ("regionvit", "RegionViT"): {**stages, "window_size": 4},
        ("scalable_vit", "ScalableViT"): {**stages, "dim": 16, "heads": (1, 2, 2, 2), "ssa_dim_key": (8, 8, 8, 8),
                                          "reduction_factor": (4, 4, 2, 1), "window_size": (4, 4, None, None)},
        ("twins_svt", "TwinsSVT"): {"num_classes": 3, "s3_depth": 1, **twins},
        ("max_vit", "MaxViT"): {"num_classes": 3, "dim_conv_stem": 8, "dim": 8, "dim_head": 8, "depth": (1, 1),
                                "window_size": 4},
        ("nest", "NesT"): {"image_size": SQUARE, "patch_size": 4, "num_classes": 3, "dim": 16, "heads": 2,
                           "num_hierarchies": 3, "block_repeats": (1, 1, 1)},
        ("mobile_vit", "MobileViT"): {"image_size": (SQUARE, SQUARE), "dims": [16] * 3, "channels": [8] * 11,
                                      "num_classes": 3},
        ("cross_vit", "CrossViT"): {"image_size": SQUARE, "num_classes": 3, "sm_dim": 16, "lg_dim": 16,
                                    "sm_patch_size": 8, "lg_patch_size": 16, "depth": 1},
        ("t2t", "T2TViT"): {"image_size": SQUARE, "num_classes": 3, "dim": 32, "depth": 1, "heads": 2, "mlp_dim": 48,
                            "t2t_layers": ((7, 4), (3, 2))},
        ("levit", "LeViT"): {"image_size": SQUARE, "num_classes": 3, "stages": 2, "dim": (16, 32), "depth": 1,
                             "heads": (2, 2), "mlp_mult": 2},
    }  # fmt: skip
    for (module, name), own in settings.items():
        build = getattr(import_module(f"vit_pytorch.{module}"), name)
        yield f"{name} {module}", lambda build=build, own=own: build(**own)


def nnunet() -> Iterator[tuple[str, Build]]:
    from dynamic_network_architectures.architectures import unet

    stages: dict[str, Any] = {"n_stages": 4, "features_per_stage": [8, 16, 16, 16], "conv_op": nn.Conv2d}
    stages |= {"kernel_sizes": 3, "strides": [1, 2, 2, 2], "num_classes": 2, "conv_bias": True}
    stages |= {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}}
    stages |= {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    plain = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "deep_supervision": True}
    residual = {"n_blocks_per_stage": [1, 2, 2, 2], "n_conv_per_stage_decoder": 1}
    yield "PlainConvUNet", lambda: unet.PlainConvUNet(3, **stages, **plain)
    yield "ResidualEncoderUNet", lambda: unet.ResidualEncoderUNet(3, **stages, **residual)
    batch = {**stages, "norm_op": nn.BatchNorm2d}
    yield "ResidualUNet batch", lambda: unet.ResidualUNet(3, **batch, **residual)


def open_clip() -> Iterator[tuple[str, Build]]:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    tokens: dict[str, Any] = {"image_size": SIZE, "patch_size": 16, "width": 32, "layers": 2, "heads": 2}
    tokens |= {"mlp_ratio": 2, "output_dim": 16}
    pool = {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 2}
    yield "ModifiedResNet", lambda: ModifiedResNet((1, 1, 1, 1), 16, 2, image_size=SQUARE, width=8)
    yield "VisionTransformer", lambda: VisionTransformer(**tokens)
    yield "VisionTransformer attentional pool", lambda: VisionTransformer(**tokens, **pool)


class Grey(nn.Module):
    """A network for grey images, applied to the first channel."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[:, :1])


def torchxrayvision() -> Iterator[tuple[str, Build]]:
    from torchxrayvision.models import DenseNet

    few: dict[str, Any] = {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}
    yield "DenseNet", lambda: Grey(DenseNet(weights=None, num_classes=3, **few))


def efficientnet_pytorch() -> Iterator[tuple[str, Build]]:
    from efficientnet_pytorch import EfficientNet

    yield "b0", lambda: EfficientNet.from_name("efficientnet-b0", image_size=SQUARE, num_classes=3)


def pretrainedmodels() -> Iterator[tuple[str, Build]]:
    import pretrainedmodels

    yield "xception", lambda: pretrainedmodels.xception(num_classes=1000, pretrained=None)


def ultralytics() -> Iterator[tuple[str, Build]]:
    from ultralytics.nn import tasks

    for name in ("yolov8n", "yolo11n"):
        yield f"{name}-cls", lambda name=name: tasks.ClassificationModel(f"{name}-cls.yaml", nc=3, verbose=False)
        yield name, lambda name=name: tasks.DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    yield "yolov8n-seg", lambda: tasks.SegmentationModel("yolov8n-seg.yaml", nc=3, verbose=False)


# By package: the name of its rows, and its networks.
SOURCES: dict[str, tuple[str, Callable[[], Iterator[tuple[str, Build]]]]] = {
    "segmentation_models_pytorch": ("smp", smp),
    "monai": ("monai", monai),
    "transformers": ("transformers", transformers),
    "vit_pytorch": ("vit_pytorch", vit_pytorch),
    "dynamic_network_architectures": ("nnU-Net", nnunet),
    "open_clip": ("open_clip", open_clip),
    "torchxrayvision": ("torchxrayvision", torchxrayvision),
    "efficientnet_pytorch": ("efficientnet_pytorch", efficientnet_pytorch),
    "pretrainedmodels": ("pretrainedmodels", pretrainedmodels),
    "ultralytics": ("ultralytics", ultralytics),
}
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # name in pip, if different
# Networks that accept only square images.
SQUARES = ("transformers Pvt", "transformers Dinov2", "open_clip ModifiedResNet", *(
    f"vit_pytorch {name}" for name in (
        "DeepViT deepvit", "CaiT cait", "ViT vit_for_small_dataset", "XCiT xcit", "PiT pit", "RvT rvt",
        "RegionViT regionvit", "TwinsSVT twins_svt", "NesT nest", "MobileViT mobile_vit", "CrossViT cross_vit",
        "T2TViT t2t", "LeViT levit")
))  # fmt: skip


def networks() -> Iterator[tuple[str, Build]]:
    """Yield the networks of the installed libraries."""
    make_torchvision_importable()
    for package, (source, own) in SOURCES.items():
        if importlib.util.find_spec(package) is not None:
            yield from ((f"{source} {name}", build) for name, build in own())


def check(build: Build, live: bool, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Return the verdict on one network."""
    torch.manual_seed(0)
    model = randomize(build()).double().train(live)
    _without_random_numbers(model)
    image = torch.randn(2 if live else 1, 3, *size, dtype=torch.float64)
    found: dict[str, Any] = {}
    for fallback in (None, "untiled"):
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
    parser.add_argument("--json", type=Path, help="file to which rows are appended")
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
            except Exception as error:  # any error of a network is its verdict
                row = {"verdict": "wrong", "message": f"{type(error).__name__}: {error}"}
            machine = provenance()
            rows.append({"network": name, "norms": norms, **row, "commit": machine["commit"]})
            error = f"{row['error']:.1e}" if "error" in row else ""
            print(f"{name:32} {norms:6} {row['verdict']:11} {error:8} {row.get('message', '')[:150]}", flush=True)
            if options.json:
                packages = (package for package in SOURCES if importlib.util.find_spec(package))
                versions = {package: version(DISTRIBUTIONS.get(package, package)) for package in packages}
                what = {"what": "benchmarks/other_libraries.py", "libraries": versions, "provenance": machine}
                options.json.write_text(json.dumps({**what, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

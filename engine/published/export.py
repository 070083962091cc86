"""Export of networks: a Hugging Face folder for timm, or ONNX; checked before it replaces the target."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GigamorphError
from ..files import write_atomically, write_json, write_tensors
from ..models.compat import make_torchvision_importable
from ..models.folder import WEIGHTS, Description, is_folder, read_description
from ..models.reference import LIMIT32, difference, forward, ordinary
from ..models.registry import open_checked
from ..models.spec import Spec
from ..models.weights import first_line, sha256
from ..train.checkpoint import load_checkpoint, preprocessing_of
from ..train.network import outputs_of_record, restore_network
from ..versions import versions_of_results
from .importing import new_folder
from .layout import trained_preprocessing
from .reference import fixed_image

_SHARED_NAMES = ("resnet18", "resnet34", "resnet50")  # built-in networks with the same name in timm


@dataclass(frozen=True)
class ExportSource:
    """A network with its weights, in evaluation mode, and its description."""

    path: Path
    network: nn.Module
    description: Description
    grown: bool = False

    @property
    def image(self) -> Tensor:
        """Return the fixed image for the check, of the size that the import used."""
        shape = self.description.reference.get("image")
        return fixed_image(self.description.preprocessing, (shape[2], shape[3]) if shape else (320, 256))


def open_source(path: str | Path) -> ExportSource:
    """Open the network in a folder of `gigamorph import` or a checkpoint of `gigamorph train`.

    Raises:
        DataError: it is neither, or its logits differ from those of its import.
        GigamorphError: it is an ensemble, or belongs to a recipe.
    """
    path = Path(path)
    if is_folder(path) or path.is_dir():
        description = read_description(path)
        return ExportSource(path, open_checked(path).float(), description)
    stored = load_checkpoint(path)
    record = stored["gigamorph"]
    if "options" not in record:
        raise GigamorphError(
            f"{path}: is a recipe's checkpoint; only networks of gigamorph train and gigamorph import can be exported"
        )
    preprocessing_of(record, path)  # refuses a damaged record
    net = restore_network(stored, path, memory_budget=None, device="cpu")
    description = Description(
        model=record["options"]["model"],
        outputs=outputs_of_record(record),
        preprocessing=trained_preprocessing(record),
        source={"file": path.name, "sha256": sha256(path)},
        versions=versions_of_results(),
    )
    return ExportSource(path, net._network.float().eval(), description, "grown" in record)


def export_hub(source: ExportSource, out: str | Path) -> float:
    """Write a folder with ``model.safetensors`` and a ``config.json`` for timm, and load it again to compare.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds it.

    Returns:
        The largest difference of its logits for a fixed image, relative to the largest logit.

    Raises:
        GigamorphError: the network is not timm's, or its logits differ when timm loads it; nothing was written.
    """
    spec = Spec.parse(source.description.model)
    timm_like = spec.kind == "timm" or (not spec.kind and spec.name in _SHARED_NAMES and "width" not in spec.arguments)
    if not timm_like or source.grown:
        what = "has grown, so that it is" if source.grown else f"({source.description.model!r}) is"
        raise GigamorphError(f"{source.path}: its network {what} not one of timm's; export it with --to onnx")
    make_torchvision_importable()
    import timm

    image = source.image
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, source.network.state_dict(), "weights", {"format": "pt"})
        write_json(folder / "config.json", _hub_config(source, spec, timm), "configuration")
        try:
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except Exception as error:  # timm's own errors
            raise GigamorphError(f"{source.path}: timm cannot load the exported folder: {first_line(error)}") from error
        return _compare(ordinary(loaded, image, str(spec)), ordinary(source.network, image, str(spec)), "timm")


def _hub_config(source: ExportSource, spec: Spec, timm: Any) -> dict[str, Any]:
    own, taken = source.description, source.description.preprocessing
    arguments = {name: value for name, value in spec.arguments.items() if name not in ("num_classes", "in_channels")}
    arguments["in_chans"] = taken.channels
    about = getattr(source.network, "pretrained_cfg", None)  # set by timm
    plain = about or timm.create_model(spec.name, num_classes=0).pretrained_cfg
    mean, std = taken.normalize.per_channel(taken.channels)
    size = taken.size or plain["input_size"][1:]
    return {
        "architecture": spec.name,
        "num_classes": own.outputs.columns if own.outputs.predicts else 0,
        "num_features": getattr(source.network, "num_features", None),
        **({"global_pool": arguments["global_pool"]} if "global_pool" in arguments else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [taken.channels, *size],
            "fixed_input_size": bool(plain.get("fixed_input_size")),
            "interpolation": "bilinear",
            "mean": list(mean),
            "std": list(std),
            "num_classes": own.outputs.columns if own.outputs.predicts else 0,
            "first_conv": plain.get("first_conv"),
            "classifier": plain.get("classifier"),
            "label_names": own.outputs.names,
            **({"license": own.licence} if own.licence else {}),
        },
        "gigamorph": own.to_json(),
    }


def export_onnx(source: ExportSource, out: str | Path, size: tuple[int, int] | None = None) -> float:
    """Write an ONNX file with the input ``image`` (N, C, H, W) and the output ``logits``, and run it to compare.

    Images must have the network's preprocessing, which the file's metadata (``gigamorph``) describes.

    Args:
        size: (height, width) of the images; None leaves them free, unless the network's padding depends on the size in
            ways that ONNX cannot express. If the network accepts few sizes, None means the one to which its
            images are resized.

    Returns:
        See `export_hub`.

    Raises:
        GigamorphError: a package is missing, the network cannot be exported, accepts few sizes and none is known, or
            ONNX Runtime outputs other logits; nothing was written.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise GigamorphError(f"ONNX export needs {error.name}; pip install 'gigamorph[onnx]'") from error
    out = Path(out)
    if out.exists():
        raise GigamorphError(f"{out}: already exists; choose another --out")
    name, network = source.description.model, copy.deepcopy(source.network).eval()
    size = size or _needed_size(source, network)
    images = [source.image] if size is None else [fixed_image(source.description.preprocessing, size)]
    if size is None:
        images.append(_other_image(source))
    program = _onnx_program(network, images[0], name, free=size is None)
    program.model.metadata_props["gigamorph"] = json.dumps(source.description.to_json())
    with new_folder(out.with_name(f".{out.name}.folder"), keep=False) as folder:
        path = folder / out.name
        write_atomically(path, lambda temporary: program.save(str(temporary)), "network")
        onnx.checker.check_model(str(path))
        far = 0.0
        for image, given in zip(images, _by_onnx_runtime(path, images, name, size is None), strict=True):
            far = max(far, _compare(given, ordinary(network, image, name), "ONNX Runtime"))
        out.parent.mkdir(parents=True, exist_ok=True)
        path.rename(out)
    return far


def _other_image(source: ExportSource) -> Tensor:
    """Return images of another size and number than those of the export."""
    height, width = source.image.shape[2:]
    return fixed_image(source.description.preprocessing, (height + 64, width + 32)).repeat(2, 1, 1, 1)


def _needed_size(source: ExportSource, network: nn.Module) -> tuple[int, int] | None:
    """Return the size to which the images are resized if the network accepts no other; None if it does.

    Raises:
        GigamorphError: it accepts no other size, and its images are not resized.
    """
    other = _other_image(source)
    try:
        forward(network, other, source.description.model)
        return None
    except GigamorphError as error:
        size, known = source.description.preprocessing.size, source.description.reference.get("image")
        if size is None:
            hint = f", as in --size {known[2]}x{known[3]}" if known else ""
            raise GigamorphError(
                f"{source.path}: its network does not accept images of any size (such as {other.shape[2]} x "
                f"{other.shape[3]}); use --size HxW{hint}"
            ) from error
        return size


def _by_onnx_runtime(path: Path, images: list[Tensor], name: str, free: bool) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0]) for image in images]
    except Exception as error:  # ONNX Runtime's own errors
        raise GigamorphError(
            f"model {name!r}: ONNX Runtime cannot run the exported file: {first_line(error)}{_hint(free)}"
        ) from error


def _hint(free: bool) -> str:
    return "; try --size HxW, which exports it for images of one size" if free else ""


def _onnx_program(network: nn.Module, image: Tensor, name: str, free: bool) -> Any:
    batch = {0: torch.export.Dim("images")}
    shapes = {**batch, 2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}
    # Two images: with one, the exporter would fix the batch size to 1.
    example = image.repeat(2, 1, 1, 1) if free else image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised inside PyTorch
            return torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=(shapes,) if free else None,
                verbose=False,
            )
    except Exception as error:  # torch.onnx raises many, nested with long texts
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise GigamorphError(f"model {name!r} cannot be exported to ONNX: {first_line(cause)}{_hint(free)}") from error


def _compare(given: Tensor, wanted: Tensor, by: str) -> float:
    far = difference(given, wanted) if given.shape == wanted.shape else float("inf")
    if not far <= LIMIT32:
        raise GigamorphError(f"logits by {by} differ by {far:.1e} from ordinary PyTorch's; nothing was written")
    return far

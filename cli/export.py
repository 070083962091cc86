"""``gigamorph export``: write a network for other programs, as a Hugging Face folder or as ONNX."""

from __future__ import annotations

import rich_click as click

from . import options


@click.command()
@click.argument("source", type=click.Path())
@click.option("--to", required=True, type=click.Choice(["huggingface", "onnx"]), help="Format to write.")
@click.option("--out", required=True, type=click.Path(), help="Folder, or .onnx file.")
@click.option("--size", metavar="HxW", callback=options.parse_size, help="ONNX for single images of this fixed size.")
@options.trust
def export(source: str, to: str, out: str, size: tuple[int, int] | None) -> None:
    """Write the network of a checkpoint of gigamorph train or a folder of gigamorph import.

    huggingface: model.safetensors and a config.json, to be loaded with timm.create_model("local-dir:FOLDER",
    pretrained=True). This format supports networks of timm, and resnet18, resnet34 and resnet50.

    onnx: one file with the input image (N, C, H, W), normalised as in training, and the output logits. It needs onnx,
    onnxscript and onnxruntime (pip install 'gigamorph[onnx]').

    Files are written only if timm or ONNX Runtime gives the logits of ordinary PyTorch to 1e-5.

    Example: gigamorph export run/best.ckpt --to onnx --out net.onnx
    """
    from ..engine.published.export import export_hub, export_onnx, open_source

    if to == "huggingface" and size is not None:
        raise click.UsageError("--size needs --to onnx; a Hugging Face folder accepts images of any size")
    source_network = open_source(source)
    difference = export_hub(source_network, out) if to == "huggingface" else export_onnx(source_network, out, size)
    by = "timm" if to == "huggingface" else "ONNX Runtime"
    click.echo(f"{out}: logits of {by} differ by {difference:.0e} from those of ordinary PyTorch")

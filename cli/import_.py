"""``gigamorph import``: convert a published network into a folder that every command accepts as a model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import rich_click as click

from ..engine.errors import GigamorphError
from . import options


def _parse_resize(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | str | None:
    return value if value in (None, "none") else options.parse_size(ctx, param, value)


def _parse_heads(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise click.BadParameter(f"{value!r}; write NAME=ACTIVATION:CLASSES, as in density=softmax:A,B,C,D")
        found.append((name, rest))
    return tuple(found)


@click.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write.")
@click.option(
    "--weights",
    metavar="FILE",
    help="State dict, checkpoint or Hugging Face folder on disk; cache: the weights that timm fetched earlier.",
)
@click.option(
    "--prefix",
    default="",
    metavar="NAMES",
    show_default=False,
    help="Use the weights whose names begin like this, as in model.",
)
@click.option(
    "--layout",
    type=click.Choice(["mammoscreen", "rsna-2023", "mammo-clip", "gmic"]),
    help="Layout of a checkpoint; by default recognised by the names in it.",
)
@click.option(
    "--activation",
    type=click.Choice(["softmax", "sigmoid", "probability", "features"]),
    help="Kind of outputs; by default softmax, or sigmoid for a single output.",
)
@click.option("--classes", metavar="NAMES", help="Names of the outputs, with commas between; by default 0,1,...")
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="NAME=...",
    callback=_parse_heads,
    help="One of several heads, in order, as in density=softmax:A,B,C,D. Repeatable.",
)
@click.option("--channels", type=click.Choice([1, 3]), help="Image channels; by default those of the weights.")
@click.option("--mean", callback=options.parse_numbers, metavar="NUMBERS", help="Grey value taken as zero, 0 to 1.")
@click.option("--std", callback=options.parse_numbers, metavar="NUMBERS", help="Spread that is scaled to one.")
@click.option("--voi", help="Grey scale of DICOM images: auto, none, minmax, window:I or lut:I.")
@click.option(
    "--per-image",
    type=click.Choice(["minmax", "standard", "none"]),
    help="Scale each image by its own pixels: to [0, 1], or to mean 0 and standard deviation 1.",
)
@click.option(
    "--resize",
    metavar="HxW|none",
    callback=_parse_resize,
    help="Resize images to this size; none keeps every pixel, even if the layout has a size.",
)
@click.option("--fit", type=click.Choice(["pad", "widen", "stretch"]), help="How images get this size; by default pad.")
@click.option("--licence", default="", show_default=False, help="Licence of the weights, to be stored with them.")
@click.option("--size", metavar="HxW", callback=options.parse_size, help="Size of the image that checks the import.")
@options.trust_pickles
@options.flips("Also average over the mirrored image. Repeatable; every SOURCE must then be a folder.")
def import_(
    sources: tuple[str, ...],
    out: str,
    weights: str | None,
    prefix: str,
    layout: str | None,
    activation: Any,
    classes: str | None,
    heads: tuple[tuple[str, str], ...],
    licence: str,
    size: tuple[int, int] | None,
    trust: bool,
    flips: tuple[str, ...],
    **given: Any,
) -> None:
    """Convert a published network into a folder with its weights, its constructor, and its inputs and outputs.

    SOURCE is one of these: a network with arguments (timm:NAME?in_chans=1&global_pool=max, module:function?width=32)
    and its --weights; a Hugging Face folder on disk; a checkpoint of ianpan/mammoscreen, the RSNA 2023 winner,
    Mammo-CLIP or GMIC; or several folders of gigamorph import, which become an ensemble (mean of probabilities).

    The folder contains the logits of ordinary PyTorch for a fixed image. It is written only if tiled execution gives
    the same logits, to 1e-5 in float32 and 1e-12 in float64. predict, explain, train --init, morph, bench and plan
    accept it as a model. Nothing is downloaded.

    Example: gigamorph import "timm:tf_efficientnetv2_s?in_chans=1&global_pool=max" --weights model.safetensors
    --out net
    """
    from ..engine.datasets.flips import FLIPS
    from ..engine.models.folder import Preprocessing, is_folder, require_no_run
    from ..engine.published.importing import Wishes, import_ensemble, import_network
    from ..engine.trust import trust_named

    trust_named(*(source for source in sources if not Path(source).exists()))
    if flips or len(sources) > 1:
        for source in sources:
            if not is_folder(source):
                require_no_run(source)
                raise GigamorphError(
                    f"{source}: ensembles and --flip need folders of gigamorph import; make one first: gigamorph "
                    f"import {source} --out FOLDER"
                )
        path = import_ensemble(sources, out, [FLIPS[flip] for flip in flips])
        networks = f"{len(sources)} network{'s' * (len(sources) > 1)}"
        click.echo(f"{path}: mean of {networks}, {1 + len(flips)} view{'s' * bool(flips)} of each image")
        return
    known = {field.name for field in fields(Preprocessing)}
    wanted = {key: value for key, value in given.items() if key in known and value is not None}
    if given["resize"] is not None:
        wanted["size"] = None if given["resize"] == "none" else given["resize"]
    if wanted.get("per_image") == "none":
        wanted["per_image"] = None
    names = tuple(name.strip() for name in classes.split(",")) if classes else ()
    wishes = Wishes(weights, prefix, layout, activation, names, heads, wanted, licence, size, trust)
    for folder in import_network(next(iter(sources)), out, wishes, click.echo):
        _print_summary(folder)


def _print_summary(folder: Any) -> None:
    from ..engine.models.folder import read_description

    found = read_description(folder)
    inputs = found.preprocessing
    size = f", {inputs.size[0]} x {inputs.size[1]} ({inputs.fit})" if inputs.size else ", every pixel"
    click.echo(f"{folder}: {found.model}")
    click.echo(f"  outputs: {_listed(found.outputs.names) or f'{found.outputs.columns} features'}")
    channels = f"{inputs.channels} channel{'s' * (inputs.channels > 1)}"
    click.echo(f"  inputs: {channels}{size}, mean {list(inputs.mean)}, std {list(inputs.std)}")
    error = ", ".join(f"{found.reference[f'{kind} difference']:.0e} in {kind}" for kind in ("float32", "float64"))
    casts = "; it casts to float32 itself, in the second comparison to float64" if "casts" in found.reference else ""
    licence = found.licence or "not stated"
    click.echo(f"  tiled logits differ from those of ordinary PyTorch by {error}{casts}; licence {licence}")


def _listed(names: list[str]) -> str:
    if len(names) > 20:
        names = [*names[:3], "...", f"{names[-1]} ({len(names)} in total)"]
    return ", ".join(names)

"""``gigamorph morph``: networks in files grow, keep their function, and are checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..engine.morph.files import Grown
    from ..engine.morph.report import Report

    Change = Callable[[nn.Module, Tensor], tuple[nn.Module, Report]]


def _parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    return None if value is None else options.parse_size(ctx, param, value)


def _parse_pairs(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[int | str, int]:
    """``layer1.0.conv1.weight:0=96`` -> {"layer1.0.conv1.weight:0": 96}; an id is a number."""
    found: dict[int | str, int] = {}
    for text in value:
        key, equals, number = text.rpartition("=")
        if not equals or not number.isdecimal():
            raise click.BadParameter(f"{text!r}; write SPACE=NUMBER, as in 3=192", ctx, param)
        found[int(key) if key.isdecimal() else key] = int(number)
    return found


_size: Any = click.option(
    "--size",
    metavar="HxW",
    callback=_parse_size,
    help="Images that the checks take; by default 64x64, times the factor of every front.",
)
_in: Any = click.option("--in", "source", metavar="FILE", help="Weights; their recipe is found with them.")
_random: Any = click.option("--random-weights", is_flag=True, help="Go on without --in, to try a command.")
_out: Any = click.option("--out", required=True, metavar="FILE", help="Where the grown weights go.")
_seed: Any = click.option("--seed", type=int, default=0, show_default=True, help="For all that is drawn.")
_act: Any = click.option(
    "--act", metavar="NAME", help="Activation, as torch.nn spells it, e.g. ReLU, GELU, SiLU, LeakyReLU(0.1)."
)


def _shared(*extra: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of every command that grows a network."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(
            [options.model, _in, _out, _random, options.classes_count, options.channel_count, _size]
        ):
            command = option(command)
        for option in reversed(extra):
            command = option(command)
        return command

    return add


@click.group()
def morph() -> None:
    """Grow a trained network so that it computes the same as before: wider, deeper, for larger images.

    Weights are .safetensors files (or .pt, .pth), or those in a --model that is a folder of gigamorph import. The
    recipe, a list of the morphs in JSON, goes into the file and beside it, so that the next command needs only --model,
    --classes and --channels of the network that it began as.
    Every morph is checked in float64 and float32, in eval and train mode; nothing is written if a check fails.

    Example: gigamorph morph widen --in a.safetensors --out b.safetensors --model resnet18 --factor 1.5
    """


@morph.command()
@_shared(
    click.option("--factor", type=float, help="Widen every space that can grow by this factor."),
    click.option("--space", "counts", multiple=True, metavar="SPACE=WIDTH", callback=_parse_pairs, help="One space."),
    click.option(
        "--free", multiple=True, metavar="SPACE=N", callback=_parse_pairs, help="New random channels, read by nothing."
    ),
    click.option(
        "--split",
        type=click.Choice(["sterbenz", "kraft"]),
        default="sterbenz",
        show_default=True,
        help="How the weights that read a copied channel are shared out: at random, or by powers of two.",
    ),
    click.option(
        "--groups",
        type=click.Choice(["more", "wider"]),
        default="more",
        show_default=True,
        help="Whether grouped convolutions get more groups (32x4d to 64x4d) or wider ones (to 32x8d).",
    ),
    _seed,
)
def widen(
    factor: float | None,
    counts: dict[int | str, int],
    free: dict[int | str, int],
    split: str,
    groups: str,
    seed: int,
    **given: Any,
) -> None:
    """Widen all channel spaces by a factor, or some as --space says; gigamorph morph spaces lists them.

    Example: gigamorph morph widen --in a.safetensors --out b.safetensors --model resnet18 --factor 1.5
    """
    if factor is None and not counts and not free:
        raise click.UsageError("say how wide: --factor 1.5, or --space 3=192 (gigamorph morph spaces lists them)")
    from ..engine.morph.widen import widen as run

    _grow(given, lambda net, x: run(net, x, counts, factor, free=free, split=split, seed=seed, groups=groups))


@morph.command()
@_shared(
    click.option("--at", required=True, metavar="PATH", help="The module after which it goes, e.g. layer1.0."),
    click.option(
        "--how",
        type=click.Choice(["residual", "pair", "identity"]),
        default="residual",
        show_default=True,
        help="A residual block, phi(x) - phi(-x), or an identity convolution.",
    ),
    click.option("--kernel", type=click.IntRange(1), help="Kernel, odd; 3 by default, 1 for a pair."),
    _act,
    click.option("--norm/--no-norm", default=None, help="BatchNorm; a residual block has it by default."),
    _seed,
)
def deepen(at: str, how: str, kernel: int | None, act: str | None, norm: bool | None, seed: int, **given: Any) -> None:
    """Put a new layer or block after a module.

    An identity with BatchNorm is exact in eval mode only; all others in train mode too.

    Example: gigamorph morph deepen --in b.safetensors --out c.safetensors --model resnet18 --at layer1.0
    """
    from ..engine.morph import deepen as d

    if how == "pair" and norm is not None:
        raise click.UsageError("a pair has no BatchNorm; omit --norm")

    def change(net: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
        if how == "identity":
            return d.insert_identity(net, x, at, kernel or 3, norm=bool(norm), act=act)
        if how == "pair":
            return d.insert_pair(net, x, at, act or "GELU", kernel or 1)
        return d.insert_residual(net, x, at, act or "ReLU", kernel or 3, norm=norm is not False, seed=seed)

    _grow(given, change)


@morph.command()
@_shared(
    click.option("--at", required=True, multiple=True, metavar="PATH", help="The convolution; may be given often."),
    click.option("--kernel", required=True, type=click.IntRange(1), help="The new kernel."),
)
def kernel(at: tuple[str, ...], kernel: int, **given: Any) -> None:
    """Enlarge the kernels of convolutions.

    Example: gigamorph morph kernel --in a.safetensors --out b.safetensors --model resnet18 --at conv1 --kernel 9
    """
    from ..engine.morph.kernel_size import grow_kernel

    _grow(given, lambda net, x: grow_kernel(net, x, at, kernel))


@morph.command()
@_shared(
    click.option("--factor", required=True, type=click.IntRange(2), help="How much larger the images are, each way."),
    click.option(
        "--mode",
        type=click.Choice(["stages", "fold", "residual", "keep"]),
        default="stages",
        show_default=True,
        help="Strided convolutions, one large convolution, the downsampler plus a learnt branch, or it alone.",
    ),
    click.option(
        "--downsample",
        type=click.Choice(["area", "bilinear", "antialias"]),
        default="area",
        show_default=True,
        help="How the images of the old network were shrunk.",
    ),
    click.option("--filters", type=click.IntRange(1), default=8, show_default=True, help="Filters of each stage."),
    _act,
    _seed,
)
def front(factor: int, mode: str, downsample: str, filters: int, act: str | None, seed: int, **given: Any) -> None:
    """Make a network that was trained on shrunk images read them at full size.

    The sides of its images must be multiples of the factor. --size is that of the small images.

    Example: gigamorph morph front --in c.safetensors --out d.safetensors --model resnet18 --factor 4
    """
    from ..engine.morph.front import front as run

    more = {"downsample": downsample, "filters": filters, "act": act or "ReLU", "seed": seed}
    _grow(given, lambda net, x: run(net, x, factor, mode, **more))


@morph.command("input")
@_shared(
    click.option("--to", type=click.Choice(["grey", "rgb"]), help="Turn RGB into grey, or grey into RGB."),
    click.option("--planes", type=click.IntRange(1), help="Further image planes, read with weight zero."),
    click.option(
        "--mean",
        default="0.485,0.456,0.406",
        show_default=True,
        callback=options.parse_numbers,
        help="Of the RGB images, for --to grey.",
    ),
    click.option(
        "--std",
        default="0.229,0.224,0.225",
        show_default=True,
        callback=options.parse_numbers,
        help="Of the RGB images, for --to grey.",
    ),
)
def input_(to: str | None, planes: int | None, mean: tuple[float, ...], std: tuple[float, ...], **given: Any) -> None:
    """Change the image channels that a network reads.

    With --to grey the network takes grey values from 0 to 1, and sees what the old one saw of them repeated in three
    channels and normalised by --mean and --std.

    Example: gigamorph morph input --in a.safetensors --out b.safetensors --model resnet18 --channels 3 --to grey
    """
    if (to is None) == (planes is None):
        raise click.UsageError("say what the images become: --to grey, --to rgb or --planes 1")
    from ..engine.morph import inputs

    def change(net: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
        if to == "grey":
            return inputs.to_grey(net, x[:, :1], mean=mean, std=std)
        if to == "rgb":
            return inputs.to_rgb(net, x.new_zeros(1, 3, *x.shape[2:]))
        assert planes is not None
        return inputs.add_planes(net, x.new_zeros(1, x.shape[1] + planes, *x.shape[2:]), planes)

    _grow(given, change)


@morph.command()
@_shared(
    click.option("--at", metavar="PATH", help="The classifier; the last layer by default."),
    click.option("--outputs", type=click.IntRange(2), help="How many outputs it shall have."),
    click.option(
        "--kind",
        type=click.Choice(["independent", "softmax"]),
        default="independent",
        show_default=True,
        help="What becomes of --outputs: for softmax the old probabilities stay, otherwise the old numbers.",
    ),
    click.option("--split", type=click.IntRange(0), metavar="CLASS", help="Split this softmax class instead."),
    click.option("--into", type=click.IntRange(2), default=2, show_default=True, help="Into so many parts."),
)
def head(at: str | None, outputs: int | None, kind: str, split: int | None, into: int, **given: Any) -> None:
    """Give the classifier more outputs, or split a class into several.

    Example: gigamorph morph head --in a.safetensors --out b.safetensors --model resnet18 --outputs 4 --kind softmax
    """
    if (outputs is None) == (split is None):
        raise click.UsageError("say how it grows: --outputs 4, or --split 1 --into 3")
    from ..engine.morph.head import grow_head, split_class

    def change(net: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
        path = at or _last_layer(net)
        if split is not None:
            return split_class(net, x, path, split, into)
        assert outputs is not None
        return grow_head(net, x, path, outputs, kind)

    _grow(given, change)


@morph.command()
@_shared()
def merge(**given: Any) -> None:
    """Fold channels that are exact copies of each other into one: the inverse of widen, until they are trained.

    Example: gigamorph morph merge --in b.safetensors --out a2.safetensors --model resnet18
    """
    from ..engine.morph.merge import merge as run

    _grow(given, run)


@morph.command()
@options.model
@_in
@options.classes_count
@options.channel_count
@_size
@click.option("--image", metavar="HxW", callback=_parse_size, help="Images that costs are for; --size by default.")
@click.option("--picture", metavar="FILE", help="Draw the table as a PNG too.")
def spaces(
    model: str,
    source: str | None,
    classes: int,
    channels: int,
    size: tuple[int, int] | None,
    image: tuple[int, int] | None,
    picture: str | None,
) -> None:
    """List what can be widened, what only together, what not and why, and what a further channel costs.

    Example: gigamorph morph spaces --model resnet18 --image 4096x3328 --picture spaces.png
    """
    from ..engine.morph.files import open_network
    from ..engine.morph.planner import plan_growth
    from .morph_table import show_growth

    net = open_network(model, source, classes, channels)
    growth = plan_growth(net.network, net.example(size), image)
    if picture:
        from ..engine.morph.picture import save_picture

        save_picture(growth, picture, model)
    show_growth(growth)


@morph.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.model
@options.classes_count
@options.channel_count
@_size
def verify(first: str, second: str, model: str, classes: int, channels: int, size: tuple[int, int] | None) -> None:
    """Compare the functions of two networks: weights files, or the recipes beside them.

    B may have grown from A: a front shrinks A's images, a grown head is compared in its old outputs. The exit code is
    0 if they are equal in eval mode, 1 if they differ.

    Example: gigamorph morph verify a.safetensors d.safetensors --model resnet18
    """
    from ..engine.morph.files import compare_networks, open_network, verdict

    networks = [open_network(model, path, classes, channels) for path in (first, second)]
    difference = compare_networks(networks[0], networks[1], size)
    equal, text = verdict(difference)
    click.echo(text)
    click.echo(f"difference: {difference}")
    if not equal:
        raise SystemExit(1)


def _grow(given: dict[str, Any], change: Change) -> None:
    """Open, grow, save, and show the report."""
    from ..engine.morph.files import add_morph, check_target, save_network
    from .morph_table import show_report

    check_target(given["out"])
    parent = _open(given)
    child, report = change(parent.network, parent.example(given["size"]))
    grown = add_morph(parent, child, report)
    recipe = save_network(given["out"], grown)
    show_report(report)
    click.echo(f"written: {given['out']}, {recipe}")


def _open(given: dict[str, Any]) -> Grown:
    from ..engine.errors import MorphError
    from ..engine.models.folder import is_folder
    from ..engine.morph.files import open_network

    if given["source"] is None and not given["random_weights"] and not is_folder(given["model"]):
        raise MorphError("no weights are given, so there is no function to keep: --in FILE (or --random-weights)")
    return open_network(given["model"], given["source"], given["classes"], given["channels"])


def _last_layer(net: nn.Module) -> str:
    """The classifier, in the order of the modules."""
    from torch.nn import Conv2d, Linear

    from ..engine.errors import MorphError

    names = [name for name, module in net.named_modules() if isinstance(module, (Linear, Conv2d))]
    if not names:
        raise MorphError("the network has no linear layer and no convolution; name the classifier: --at PATH")
    return names[-1]

"""``gigamorph morph``: grow networks in files, and check that the function is the same before writing anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.errors import MorphError
from ..engine.morph.operations import OPERATIONS, Argument, Operation
from . import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..engine.morph.files import Grown


def _parse_sizes(text: str) -> int | tuple[int, ...]:
    """Parse ``3``, or one number per image axis, ``3x5``."""
    return tuple(map(int, text.split("x"))) if "x" in text else int(text)


def _parse_pairs(value: tuple[str, ...], number: Callable[[str], Any]) -> dict[int | str, Any]:
    """Parse ``layer1.0.conv1.weight:0=96`` as {"layer1.0.conv1.weight:0": 96}; an id becomes an integer."""
    found: dict[int | str, Any] = {}
    for key, equals, text in (part.rpartition("=") for part in value):
        if not equals:
            raise ValueError
        found[int(key) if key.isdecimal() else key] = number(text)
    return found


def _parse_factor(value: tuple[str, ...]) -> float | dict[int | str, float]:
    return float(value[0]) if len(value) == 1 and "=" not in value[0] else _parse_pairs(value, float)


# Type annotation of an argument -> metavar of the option, whether it can be repeated, and its parser.
_TYPES: dict[str, tuple[str, bool, Callable[[Any], Any]]] = {
    "int": ("NUMBER", False, int),
    "float": ("NUMBER", False, float),
    "str": ("TEXT", False, str),
    "str | Sequence[str]": ("PATH", True, tuple),
    "Sequence[str]": ("PATH", True, tuple),
    "Sequence[float]": ("A,B,...", False, lambda text: tuple(float(part) for part in text.split(","))),
    "int | tuple[int, ...]": ("K, KxK or DxKxK", False, _parse_sizes),
    "int | Sequence[int]": ("K, KxK or DxKxK", False, _parse_sizes),
    "tuple[Size, Size]": ("K,K", False, lambda text: tuple(_parse_sizes(part) for part in text.split(","))),
    "tuple[int, int]": ("HxW", False, _parse_sizes),
    "Counts": ("SPACE=WIDTH", True, lambda value: _parse_pairs(value, int)),
    "Mapping[int | str, int]": ("SPACE=N", True, lambda value: _parse_pairs(value, int)),
    "float | Mapping[str, float]": ("FACTOR or PATTERN=FACTOR", True, _parse_factor),
}

_size: Any = click.option(
    "--size",
    metavar="HxW",
    callback=options.parse_size,
    help="Size of the images for the checks; by default 64x64, times the factor of every front.",
)
_in: Any = click.option("--in", "source", metavar="FILE", help="Weights file; the recipe in it or next to it is used.")
_random: Any = click.option("--random-weights", is_flag=True, help="Use random weights without --in, to try a command.")
_out: Any = click.option("--out", required=True, metavar="FILE", help="File for the grown weights.")
_SHARED = (options.model, _in, _out, _random, options.classes_count, options.channel_count, _size)


class _Morph(click.RichCommand):
    """A command of the table; it creates the options of its functions on request, because that imports PyTorch."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        source = f"--in a.safetensors --out b.safetensors --model resnet18 {operation.example}".rstrip()
        text = f"{operation.help}\n\nExample: gigamorph morph {operation.name} {source}"
        super().__init__(name=operation.name, callback=self.grow, help=text)

    @property
    def params(self) -> list[click.Parameter]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self._params:
            carrier: Any = click.Command(None)
            for option in _SHARED:
                carrier = option(carrier)
            if self.operation.choice:
                keys = click.Choice([*self.operation.functions])
                more: Any = {"type": keys, "default": self.operation.default or None}
                carrier.params.append(
                    click.Option([f"--{self.operation.choice}", "key"], help="Kind of morph.", **more)
                )
            self._params = [*carrier.params, *map(_option, self.operation.arguments())]
        return self._params

    @params.setter
    def params(self, value: list[click.Parameter]) -> None:
        self._params = value

    def grow(self, key: str | None = None, **given: Any) -> None:
        """Open and grow the network, save it, and show the report."""
        from ..engine.morph.files import add_morph, check_target, save_network
        from .progress import StageView

        operation = self.operation
        own = {a.option: given.pop(a.option) for a in operation.arguments()}
        own = {name: value for name, value in own.items() if value not in (None, ())}
        chosen = operation.chosen(key, own)
        if chosen is None:
            raise click.UsageError(
                f"options are missing or ambiguous, e.g. {operation.example}; --help lists all options"
            )
        parameters, missing = operation.parameters(chosen), operation.required(chosen) - own.keys()
        for name in [*missing, *(own.keys() - parameters.keys())]:
            flag, what = f"--{name.replace('_', '-')}", f"{operation.name} {chosen}".strip()
            raise click.UsageError(f"{what} {'needs' if name in missing else 'has no'} {flag}")
        check_target(given["out"])
        parent = _open(given)
        if operation.last_layer:
            own.setdefault("at", _last_layer(parent.network))
        image = _image(chosen, parent.example(given["size"]), own)
        arguments = {parameters[name].name: value for name, value in own.items()}
        with StageView("gigamorph.morph"):
            child, report = operation.function(chosen)(parent.network, image, **arguments)
        recipe = save_network(given["out"], add_morph(parent, child, report))
        click.echo(str(report))
        click.echo(f"written: {given['out']}, {recipe}")


def _option(argument: Argument) -> click.Option:
    """Create the option of an argument; if it is omitted, the function uses its own default."""
    name = argument.option.replace("_", "-")
    defaults = {key: value for key, value in argument.defaults.items() if value is not inspect.Parameter.empty}
    texts = {f"{value} for {key}" if len(defaults) > 1 else f"{value}" for key, value in defaults.items() if value}
    text = argument.help + (f" [default: {', '.join(sorted(texts))}]" if texts else "")
    if argument.annotation == "bool":
        return click.Option([f"--{name}/--no-{name}"], default=None, help=text)
    metavar, often, convert = _TYPES[argument.annotation]

    def parse(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if value in (None, ()):
            return value
        try:
            return convert(value)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not valid; write {metavar}", ctx, param) from None

    return click.Option([f"--{name}"], metavar=metavar, multiple=often, callback=parse, help=text)


def _image(key: str, image: Tensor, own: Mapping[str, Any]) -> Tensor:
    """Return the child's image, which may have other channels than the parent's."""
    channels = {"grey": 1, "rgb": 3, "planes": image.shape[1] + own.get("planes", 0)}.get(key, image.shape[1])
    return image.new_zeros(1, channels, *image.shape[2:])


@click.group()
def morph() -> None:
    """Grow a trained network so that it computes the same as before: wider, deeper, for larger images.

    Weights are .safetensors files (or .pt, .pth), or those of a --model that is a folder of gigamorph import. The
    recipe, a list of the morphs in JSON, is written into the file and next to it. So the next command needs only
    --model, --classes and --channels of the original network.
    Every morph is checked in float64 and float32, in eval and train mode; nothing is written if a check fails.

    Example: gigamorph morph widen --in a.safetensors --out b.safetensors --model resnet18 --factor 1.5
    """


for _operation in OPERATIONS:
    morph.add_command(_Morph(_operation))


@morph.command()
@options.model
@_in
@options.classes_count
@options.channel_count
@_size
@click.option(
    "--image", metavar="HxW", callback=options.parse_size, help="Image size for the costs; --size by default."
)
@click.option("--picture", metavar="FILE", help="Also draw the table as a PNG file.")
def spaces(
    model: str,
    source: str | None,
    classes: int,
    channels: int,
    size: tuple[int, int] | None,
    image: tuple[int, int] | None,
    picture: str | None,
) -> None:
    """List the channel spaces: whether each can be widened, why not, and the cost of one more channel.

    Example: gigamorph morph spaces --model resnet18 --image 4096x3328 --picture spaces.png
    """
    from ..engine.morph.files import open_network
    from ..engine.morph.planner import plan_growth

    net = open_network(model, source, classes, channels)
    growth = plan_growth(net.network, net.example(size), image)
    if picture:
        from ..engine.morph.picture import save_picture

        save_picture(growth, picture, model)
    click.echo(str(growth))


@morph.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.model
@options.classes_count
@options.channel_count
@_size
def verify(first: str, second: str, model: str, classes: int, channels: int, size: tuple[int, int] | None) -> None:
    """Compare the functions of two networks, given by weights files or by the recipes next to them.

    B may have grown from A: a front shrinks A's images, and a grown head is compared in its old outputs. The exit code
    is 0 if they are equal in eval mode, and 1 if they differ.

    Example: gigamorph morph verify a.safetensors d.safetensors --model resnet18
    """
    from ..engine.morph.files import compare_networks, open_network, verdict
    from .progress import StageView

    networks = [open_network(model, path, classes, channels) for path in (first, second)]
    with StageView("gigamorph.morph"):
        difference = compare_networks(networks[0], networks[1], size)
    equal, text = verdict(difference)
    click.echo(text)
    click.echo(f"difference: {difference}")
    if not equal:
        raise SystemExit(1)


def _open(given: dict[str, Any]) -> Grown:
    from ..engine.models.folder import is_folder
    from ..engine.morph.files import open_network

    if given["source"] is None and not given["random_weights"] and not is_folder(given["model"]):
        raise MorphError(
            "no weights are given, so there is no function to preserve; give --in FILE or --random-weights"
        )
    return open_network(given["model"], given["source"], given["classes"], given["channels"])


def _last_layer(net: nn.Module) -> str:
    """Return the path of the classifier: the last linear layer or convolution in the order of the modules."""
    from torch.nn import Conv2d, Linear

    names = [name for name, module in net.named_modules() if isinstance(module, (Linear, Conv2d))]
    if not names:
        raise MorphError("the network has no linear layer and no convolution; name the classifier by --at PATH")
    return names[-1]

"""``gigamorph bench``: image size, time and memory of a step, compared with stock PyTorch and other methods."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.files import require_writable
from . import options

if TYPE_CHECKING:
    from ..engine.bench.results import BenchTask, LimitRow, Results, StepRow
    from ..engine.bench.step import StepOptions

    MakeTask = Callable[..., BenchTask]


def _parse_json(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        require_writable(value)
    return value


_json: Any = click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_parse_json,
    help="JSON file for the results.",
)
_seconds: Any = click.FloatRange(0, min_open=True)


def _peers(names: str) -> Any:
    text = f"Method to compare: {names}; all by default. Repeatable."
    return click.option("--peer", "peers", multiple=True, metavar="NAME", help=text)


_peers_of_steps = _peers("stock, channels-last, bf16, compile, checkpoint, lightstream or gigamorph")


def _task(command: Any) -> Any:
    """Add the options for the kind of step and the device; the command gets `task`, which makes one of a model."""

    @functools.wraps(command)
    def wrapper(inference: bool, live: bool, precision: str, channels: int, device: str, **given: Any) -> None:
        def task(model: str, size: tuple[int, int] = (0, 0)) -> BenchTask:
            from ..engine.bench.results import BenchTask

            image = (1, options.channels_of(model, channels), *size)
            return BenchTask(model, image, not inference, "live" if live else "frozen", precision, device)

        command(task=task, **given)

    for option in (
        _json,
        options.device,
        options.channel_count,
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="fp32, or bf16 by autocast."
        ),
        click.option("--live", is_flag=True, help="BatchNorm in training mode, with the image's own statistics."),
        click.option("--inference", is_flag=True, help="Measure predictions instead of training steps."),
    ):
        wrapper = option(wrapper)
    return wrapper


def _parse_sizes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(options.parse_size(ctx, param, value) for value in values)


def _timed(command: Any) -> Any:
    """Add the options for models, image sizes and timing; the command gets those of `StepOptions` by name."""
    for option in (
        click.option("--box", type=_seconds, default=60.0, help="Time limit of a peer's runs, in seconds."),
        click.option("--rounds", type=click.IntRange(1), default=5, help="Most timed runs per peer."),
        click.option("--tile", type=click.IntRange(1), help="gigamorph's tile in pixels; by default the plan's."),
        click.option("--cap", metavar="SIZE", callback=options.parse_budget, help="Memory limit of a run, as in 8GiB."),
        click.option(
            "--size",
            "sizes",
            multiple=True,
            required=True,
            metavar="HxW",
            callback=_parse_sizes,
            help="Image size. Repeatable.",
        ),
        options.trust,
        click.option(
            "--model",
            "models",
            multiple=True,
            default=["resnet18"],
            metavar="SPEC",
            callback=options.named,
            help="As in gigamorph plan. Repeatable.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Measure steps on this machine, and plot the results.

    Example: gigamorph bench step --model resnet18 --size 1024x1024 --size 2048x2048 --json steps.json
    """


@bench.command()
@_timed
@options.memory_budget
@_peers_of_steps
@click.option("--profile", type=click.Path(path_type=Path, file_okay=False), help="Folder for a trace of each step.")
@_task
def step(
    models: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    peers: tuple[str, ...],
    memory_budget: int | None,
    profile: Path | None,
    task: MakeTask,
    path: Path | None,
    **timing: Any,
) -> None:
    """Measure time and peak memory of a step at each size; peers are interleaved, so that other load affects all alike.

    Without --memory-budget, gigamorph takes what its default tile needs. lightstream takes its best tile in the budget;
    without a budget, in 0.75 of stock's memory, because smaller tiles do several times the work. Next to gigamorph it
    gets a second row, in the memory that gigamorph took.

    Example: gigamorph bench step --model resnet50 --size 2048x2048 --peer stock --peer gigamorph --cap 8GiB
    """
    from ..engine.bench.peers import TRAINING
    from ..engine.bench.step import StepOptions

    chosen = StepOptions(_selected_peers(peers, TRAINING), budget=memory_budget, folder=profile, **timing)
    _compare([task(model, size) for model in models for size in sizes], chosen, path)


@bench.command()
@_timed
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG file of time against memory.")
@_task
def front(
    models: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    plot: Path | None,
    task: MakeTask,
    path: Path | None,
    **timing: Any,
) -> None:
    """Compare gigamorph at several budgets with all ways to make stock PyTorch faster or smaller.

    Ways of stock: channels-last, frozen norms folded into convolutions, torch.compile (also with max-autotune, and with
    limits of stored activations), checkpoints of blocks, lightstream. gigamorph runs without a budget, in shares of
    stock's memory, and in the least that it can.

    Example: gigamorph bench front --model resnet18 --size 512x512 --rounds 2 --json front.json --plot front.png
    """
    from ..engine.bench.front import comparisons, figure_of, ways
    from ..engine.bench.step import StepOptions, measure
    from ..engine.report.figure import png

    if plot is not None and len(models) * len(sizes) > 1:
        raise click.UsageError("--plot needs one --model and one --size")
    results = _new_results(task(models[0], sizes[0]).device)
    for own in [task(model, size) for model in models for size in sizes]:
        rows = measure(own, StepOptions(ways(own), **timing), results.ceilings, _show_step, _show_first)
        results.steps += rows
        _save(results, path)
        for found in comparisons(rows):
            click.echo(str(found))
        if plot is not None:
            plot.write_bytes(png(figure_of(rows, str(own))))
    _exit_on_failure([row for row in results.steps if row.base_peer == "gigamorph"])


@bench.command()
@_timed
@options.memory_budget
@_peers("stock, compile, onnxruntime, openvino or gigamorph")
@options.channel_count
@_json
def infer(
    models: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    peers: tuple[str, ...],
    memory_budget: int | None,
    channels: int,
    path: Path | None,
    **timing: Any,
) -> None:
    """Compare CPU predictions with ONNX Runtime, OpenVINO and torch.compile, measured as in gigamorph bench step.

    All peers get the whole image in float32 and the same number of threads. Install the runtimes with
    pip install 'gigamorph[peers]'.

    Example: gigamorph bench infer --model resnet18 --size 2048x2048 --json infer.json
    """
    from ..engine.bench.peers import INFERENCE
    from ..engine.bench.results import BenchTask
    from ..engine.bench.step import StepOptions

    chosen = StepOptions(_selected_peers(peers, INFERENCE), budget=memory_budget, **timing)
    images = [(model, (1, options.channels_of(model, channels), *size)) for model in models for size in sizes]
    _compare([BenchTask(model, image, training=False) for model, image in images], chosen, path)


@bench.command()
@options.model
@click.option(
    "--memory-budget", required=True, metavar="SIZE", callback=options.parse_budget, help="Memory limit of a step."
)
@_peers_of_steps
@click.option("--longest", type=_seconds, default=120.0, help="Time limit of a trial, in seconds.")
@_task
def limit(
    model: str, memory_budget: int, peers: tuple[str, ...], longest: float, task: MakeTask, path: Path | None
) -> None:
    """Find by trial the largest square image that trains in a budget, or predicts in it with --inference.

    Each size runs in a process of its own. gigamorph plans with 0.9 of the budget.

    Example: gigamorph bench limit --model resnet18 --memory-budget 1GiB --peer stock --peer gigamorph
    --json limits.json
    """
    from ..engine.bench.limit import Search, find
    from ..engine.bench.peers import TRAINING

    wanted = task(model)
    results = _new_results(wanted.device)
    for peer in _selected_peers(peers, TRAINING):
        row = find(wanted, peer, Search(memory_budget, longest=longest), lambda found: click.echo(f"  tried {found}"))
        results.limits.append(row)
        _show_limit(row)
        _save(results, path)
    _exit_on_failure(results.limits)


@bench.command()
@click.option("--match", default="", show_default=False, help="Measure only ops whose name contains this text.")
@_json
def kernels(match: str, path: Path | None) -> None:
    """Compare each kernel with cuDNN, eager PyTorch, torch.compile and its roofline bound, per shape. Needs a GPU.

    Example: gigamorph bench kernels --match "3x3" --json kernels.json
    """
    from ..engine.bench.scripts import measure_kernels

    found = measure_kernels(match, lambda row: click.echo(f"{row.op:40} {row.ms} {row.reason or ''}"))
    results = _new_results("cuda")
    results.kernels = found
    _save(results, path)


@bench.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the report.")
def report(results: tuple[Path, ...], out: Path) -> None:
    """Write a page with PNG plots and tables from results of gigamorph bench and benchmarks/gpu.py.

    Example: gigamorph bench report steps.json limits.json --out report
    """
    from ..engine.bench.report import write_report

    click.echo(str(write_report(results, out)))


def _compare(tasks: list[BenchTask], chosen: StepOptions, path: Path | None) -> None:
    """Check the exactness of each model, measure its tasks, and print and save the results."""
    from ..engine.bench.step import exactness, measure

    results = _new_results(tasks[0].device)
    for model in dict.fromkeys(task.model for task in tasks):
        own = [task for task in tasks if task.model == model]
        if "gigamorph" in chosen.peers:
            results.steps += [row for row in exactness(own[0]) if row.peer == "gigamorph"]
            _show_step(results.steps[-1])
        for task in own:
            results.steps += measure(task, chosen, results.ceilings, _show_step, _show_first)
            _save(results, path)
    _exit_on_failure(results.steps)


def _new_results(device: str) -> Results:
    """Return empty results with the peak rates of this machine."""
    from ..engine.bench.machine import provenance
    from ..engine.bench.process import Child
    from ..engine.bench.results import Results

    with Child() as child:
        answer = child.ask("ceilings", device=device)
    ceilings = {name: value for name, value in answer.items() if isinstance(value, float)}
    words = [word for word in sys.argv[1:] if not word.startswith("--json=")]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return Results("gigamorph " + shlex.join(words), provenance(), ceilings)


def _save(results: Results, path: Path | None) -> None:
    if path is not None:
        results.write(path)


def _exit_on_failure(rows: Iterable[StepRow | LimitRow]) -> None:
    """Exit with code 1 if a row failed or is wrong; running out of memory is a valid result."""
    from ..engine.bench.results import FAILED, WRONG

    if any(row.status in (FAILED, WRONG) for row in rows):
        raise SystemExit(1)


def _selected_peers(peers: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    from ..engine.bench.peers import PEERS

    for name in peers:
        if name not in PEERS:
            raise click.BadParameter(f"unknown peer {name!r}; choose from {', '.join(PEERS)}", param_hint="--peer")
    return peers or default


def _show_first(row: StepRow) -> None:
    click.echo(f"  {row.peer}: first step {row.first_seconds:.1f} s", err=True)


def _show_step(row: StepRow) -> None:
    time = f"{row.median_seconds:7.2f} s  {row.mpx_per_s:6.2f} Mpx/s" if row.seconds else " " * 23
    peak = f"{row.peak_bytes / 1e9:6.2f} GB  {row.bytes_per_pixel:6.0f} B/px" if row.peak_bytes else " " * 21
    error = ""
    if row.check is not None:
        gradients = row.check.outputs if row.check.gradients is None else row.check.gradients
        error = f"differs from {row.check.against} by {gradients:.0e}"
    precision = " float64" if row.task.precision == "fp64" else ""
    click.echo(f"{f'{row.task}{precision}':40} {row.peer:31} {row.status:13} {time}  {peak}  {row.reason or error}")


def _show_limit(row: LimitRow) -> None:
    found = f"{row.side} x {row.side}" if row.side else "none"
    predicted = f", plan() predicts {row.predicted_side}" if row.predicted_side else ""
    click.echo(f"{row.peer:13} {row.status:13} largest {found}{predicted}  {row.reason or ''}")

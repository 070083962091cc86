"""``gigamorph demo``: training at native resolution on phantom mammograms, with a report."""

from __future__ import annotations

import rich_click as click

from . import options


@click.command()
@click.option(
    "--out", default="demo-run", type=click.Path(file_okay=False), help="Folder; an earlier demo in it is replaced."
)
@click.option("--seed", type=click.IntRange(0), default=0)
@options.device
def demo(out: str, seed: int, device: str) -> None:
    """Train on phantom mammograms inside a memory budget that stock PyTorch exceeds, and write a report.

    Writes phantom mammograms as DICOM files, shows that their label cannot be learnt at 1/8 of the resolution, trains
    at native resolution, and compares memory and time with stock PyTorch. Takes at most four minutes on two CPU cores.

    Example: gigamorph demo --out demo-run
    """
    from ..engine.mammography.demo.report import write_report
    from ..engine.mammography.demo.run import BUDGET, FACTOR, run_demo
    from ..engine.tiling.memory import format_bytes
    from .progress import ProgressView

    with ProgressView(device=device) as view:
        result = run_demo(out, seed=seed, device=device, report=view, say=view.say)
    page = write_report(result, out)
    stock, tiled = result.stock, result.tiled
    times = stock.peak_bytes / tiled.peak_bytes
    click.echo(f"""
AUC on test patients   native resolution {result.auc_native:.3f}, 1/{FACTOR} resolution {result.auc_low:.3f}
memory of a step       {format_bytes(tiled.peak_bytes)} of a budget of {format_bytes(BUDGET)}; \
stock PyTorch takes {format_bytes(stock.peak_bytes)}, {times:.1f} times as much
time of a step         {tiled.seconds:.2f} s; stock PyTorch {stock.seconds:.2f} s
total time             {result.seconds:.0f} s, of which {result.native_seconds:.0f} s at native resolution
report                 {page}""")
    if tiled.peak_bytes > BUDGET:
        click.echo("the step exceeded its budget; please report this with the output of gigamorph doctor --report")

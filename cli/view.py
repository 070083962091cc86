"""``gigamorph view``: exams with their predictions in a browser, at up to native resolution."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import rich_click as click

from ..engine.errors import DataError
from . import options
from .counter import Count
from .interrupts import Stopped
from .messages import counted


@click.command()
@click.argument("source", type=click.Path(exists=True))
@click.option(
    "--table", type=click.Path(exists=True, dir_okay=False), help="The csv with the predicted images: findings, masks."
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for --static; by default SOURCE/view.")
@click.option("--static", is_flag=True, help="Write all missing tiles, so that the page works from files, and exit.")
@click.option(
    "--evidence",
    metavar="CHECKPOINT",
    type=click.Path(exists=True),
    help="The network of the predictions: compute its evidence maps and overlay them on the images.",
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Show the images of one split.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="Show only the N exams with the largest errors.")
@click.option("--identifiers", is_flag=True, help="Show names of patients and files; by default, exams have numbers.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=False,
    help="Port of the server; by default a free one.",
)
@click.option("--browser/--no-browser", default=True, help="Open the page.")
@options.columns
@options.white
@options.trust
@options.memory_budget
@options.device
def view(
    source: str,
    table: str | None,
    out: str | None,
    static: bool,
    evidence: str | None,
    split: str | None,
    most: int | None,
    identifiers: bool,
    port: int,
    browser: bool,
    white: Any,
    **how: Any,
) -> None:
    """Show exams in the radiological hanging order, those with the largest errors first.

    SOURCE is a folder of gigamorph predict, its predictions.csv, or the folder of a cross-validation. The page shows
    images at up to native resolution with probability, label, split, boxes of findings and evidence, and lists its
    keys. For masks (gigamorph train --task masks), it overlays the prediction and the outlines of the masks of --table.

    A server creates tiles on demand. It answers only on this machine, at the printed address with its random token;
    Ctrl-C stops it. Nothing is written without --static.

    Example: gigamorph view predictions --table table.csv --evidence run/best.ckpt
    """
    from ..engine.evaluate.read import note_of, table_in
    from ..engine.mammography.view.evidence import MapServer
    from ..engine.mammography.view.exams import read_exams
    from ..engine.mammography.view.server import PageServer
    from ..engine.mammography.view.site import ViewerFiles
    from ..engine.models.folder import digest_of

    if out is not None and not static:
        raise click.UsageError("--out needs --static")
    note = note_of(table_in(Path(source)))
    predicted_by, flips = note.get("sha256"), note.get("flip", ())
    if evidence is not None and predicted_by not in (None, digest_of(evidence)):
        raise DataError(f"{evidence}: is not the network of the predictions in {source}; give that network")
    grey = dict(note.get("grey", {}))
    grey |= {} if white is None else {"white": white}
    maps = None
    if evidence is not None:
        maps = MapServer(evidence, white=grey.get("white"), flips=flips, **how)
        grey = {**maps.grey, **grey}
    exams = read_exams(source, table=table, split=split, grey=grey)[:most]
    site = ViewerFiles(exams, maps, identifiers=identifiers)
    counts = f"{counted(len(exams), 'exam')}, {counted(len(site.views), 'image')}"
    if static:
        folder = Path(out) if out else (Path(source) if Path(source).is_dir() else Path(source).parent) / "view"
        page = site.write_page(folder)
        count = Count("images", len(site.views))
        try:
            with count:
                there = site.write_all(folder, lambda number: count.add())
        except KeyboardInterrupt as error:
            shown = f"{page} shows {count.done} of {len(site.views)} images" if count.done else "no image was written"
            click.echo(f"stopped; {shown}, and the same command continues", err=True)
            raise Stopped from error
        click.echo(f"{counts}{f', {there} of them already written' if there else ''}; {page}")
        return
    server = PageServer(site, port)
    click.echo(f"{counts}; {server.address} (Ctrl-C stops it)")
    if browser:
        click.launch(server.address)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()

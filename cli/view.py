"""``gigamorph view``: exams with their predictions in a browser, down to native pixels."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import rich_click as click

from . import options
from .counter import Count
from .interrupts import Stopped
from .numerals import counted


@click.command()
@click.argument("source", type=click.Path(exists=True))
@click.option(
    "--table", type=click.Path(exists=True, dir_okay=False), help="The csv that was predicted from: findings, masks."
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for --static; by default SOURCE/view.")
@click.option(
    "--static",
    is_flag=True,
    help="Write all tiles that are not there yet, so that the page works from its files, and end.",
)
@click.option(
    "--evidence",
    metavar="CHECKPOINT",
    type=click.Path(exists=True),
    help="The network that predicted: what its predictions rest on is computed and laid over the images.",
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Show the images of one split.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="Show the N exams that are furthest off.")
@click.option("--identifiers", is_flag=True, help="Name patients and files; exams are numbered otherwise.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the server; by default one that is free.")
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page.")
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
    memory_budget: int | None,
    device: str,
) -> None:
    """Show exams side by side as radiologists hang them, those that are furthest off first.

    SOURCE is a folder of gigamorph predict, or its predictions.csv, or the folder of a cross-validation. Images are
    shown down to their own pixels, with probability, label and split, boxes of findings and evidence; the page says
    its keys. Of masks (gigamorph train --task masks) the prediction lies over the image, with the outlines of the masks
    of --table. A server makes tiles as they are looked at, and answers only at the address that is printed, with its
    random token, on this machine; Ctrl-C ends it. Nothing is written without --static.

    Example: gigamorph view predictions --table table.csv --evidence run/best.ckpt
    """
    from ..engine.errors import DataError
    from ..engine.evaluate.read import note_of, table_in
    from ..engine.models.folder import digest_of
    from ..engine.view.evidence import Evidence
    from ..engine.view.exams import read_exams
    from ..engine.view.server import PageServer
    from ..engine.view.site import Site

    if out is not None and not static:
        raise click.UsageError("--out is the folder of --static; add --static")
    note = note_of(table_in(Path(source)))
    predicted_by, flips = note.get("sha256"), note.get("flip", ())
    if evidence is not None and predicted_by not in (None, digest_of(evidence)):
        raise DataError(f"{evidence}: is another network than that whose predictions {source} has; name that")
    grey = dict(note.get("grey", {}))
    grey |= {} if white is None else {"white": white}
    maps = None
    if evidence is not None:
        how: dict[str, Any] = {"memory_budget": memory_budget, "device": device, "flips": flips}
        maps = Evidence(evidence, white=grey.get("white"), **how)
        grey = {**maps.grey, **grey}
    exams = read_exams(source, table=table, split=split, grey=grey)[:most]
    site = Site(exams, maps, identifiers=identifiers)
    told = f"{counted(len(exams), 'exam')}, {counted(len(site.views), 'image')}"
    if static:
        folder = Path(out) if out else (Path(source) if Path(source).is_dir() else Path(source).parent) / "view"
        page = site.write_page(folder)
        written = 0

        def done(number: int) -> None:
            nonlocal written
            written += 1
            count.add()

        try:
            with Count("images", len(site.views)) as count:
                there = site.write_all(folder, done)
        except KeyboardInterrupt as error:
            shown = f"{page} shows {written} of {len(site.views)} images" if written else "no image is written"
            click.echo(f"stopped; {shown}, and the same command goes on", err=True)
            raise Stopped from error
        click.echo(f"{told}{f', {there} of them there already' if there else ''}; {page}")
        return
    server = PageServer(site, port)
    click.echo(f"{told}; {server.address} (Ctrl-C ends it)")
    if browser:
        click.launch(server.address)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()

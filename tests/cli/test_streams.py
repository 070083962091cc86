"""Commands whose standard streams are closed, full, without a reader, or of a narrow encoding."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run

from gigamorph.cli.main import _COMMANDS
from gigamorph.engine.mammography.phantom import write_phantoms

CODES = {"closed": {0}, "ascii": {0}, "full": {2}, "unread": {1, 2}}  # 2: an error output is full as well
SIZE = ["--size", "128x96"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder whose name has letters that are not ASCII, with images, a checkpoint and predictions."""
    folder = tmp_path_factory.mktemp("aufnahmen") / "Brüste"
    table = write_phantoms(folder, patients=6, height=128, width=96, seed=1)
    options = ["--model", "lesionnet?stages=1", "--epochs", "1", "--accumulate", "4"]
    assert run("train", table, *options, "--out", folder / "run") == 0
    assert run("predict", folder / "run" / "best.ckpt", table, "--out", folder / "predictions") == 0
    assert run("import", "lesionnet?stages=1", "--weights", folder / "run" / "best.ckpt", "--out", folder / "net") == 0
    return folder


def calls(folder: Path, out: Path) -> dict[str, tuple[list[object], str]]:
    """A quick call of each command, and a file that it writes; those without one only print, or refuse."""
    table, best, net = folder / "phantoms.csv", folder / "run" / "best.ckpt", folder / "net"
    predictions, [image, *_] = folder / "predictions", sorted((folder / "images").iterdir())
    return {
        "bench": (["bench", "step", "--model", net, *SIZE, "--peer", "stock", "--rounds", "1"], ""),
        "data": (["data", "index", folder / "images", "--out", out / "index.csv"], "index.csv"),
        "demo": (["demo", "--out", table], ""),
        "doctor": (["doctor"], ""),
        "eval": (
            ["eval", predictions / "predictions.csv", "--split", "all", "--resamples", "20", "--out", out / "eval"],
            "eval/metrics.json",
        ),
        "explain": (["explain", best, image, "--out", out / "maps"], "maps/marks.csv"),
        "export": (["export", best, "--to", "huggingface", "--out", out / "exported"], ""),
        "import": (["import", "lesionnet?stages=1", "--weights", best, "--out", out / "net"], "net/model.json"),
        "morph": (
            ["morph", "widen", "--model", net, "--factor", "1.5", "--out", out / "a.safetensors"],
            "a.safetensors",
        ),
        "plan": (["plan", "--model", net, *SIZE], ""),
        "predict": (["predict", best, table, "--json", "--out", out / "predicted"], "predicted/predictions.csv"),
        "recipe": (["recipe", "list"], ""),
        "train": (
            [
                "train",
                table,
                "--model",
                "lesionnet?stages=1",
                "--epochs",
                "1",
                "--accumulate",
                "4",
                "--out",
                out / "run",
            ],
            "run/best.ckpt",
        ),
        "view": (["view", predictions, "--static", "--out", out / "page"], "page/index.html"),
    }


@contextlib.contextmanager
def streams(out: str, err: str, folder: Path) -> Iterator[Path]:
    """Standard output and error of these kinds, or "file"; the file that both go to otherwise."""
    written, former = folder / "written", (sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number, name, kind in ((1, "stdout", out), (2, "stderr", err)):
            if kind == "closed":
                os.close(number)
                setattr(sys, name, None)
                continue
            if kind == "unread":
                reader, opened = os.pipe()
                os.close(reader)
            else:
                place = "/dev/full" if kind == "full" else written
                opened = os.open(place, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if place is written else 0))
            os.dup2(opened, number)
            os.close(opened)
            encoding = "ascii" if kind == "ascii" else "utf-8"
            stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding=encoding)
            setattr(sys, name, stream)
        yield written
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = former
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)


@pytest.mark.usefixtures("forked_peers", "named_rates")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("out", "err"), [("closed", "closed"), ("full", "file"), ("unread", "full"), ("ascii", "file")]
)
def test_every_command_does_its_work_where_an_output_takes_nothing(
    out: str, err: str, trained: Path, tmp_path: Path
) -> None:
    tried = calls(trained, tmp_path)
    assert set(tried) == set(_COMMANDS)
    for name, (command, file) in tried.items():
        with streams(out, err, tmp_path) as written:
            code = run(*command)
        said = written.read_text() if written.exists() else ""
        written.unlink(missing_ok=True)
        refused = name in ("demo", "export")
        assert code in ({2} if refused else CODES[out]), (name, code, said)
        assert "Traceback" not in said and "Exception ignored" not in said, (name, said)
        if out == "full" and not refused:
            assert said.count("error: ") == 1 and "No space left on device; redirect it elsewhere" in said
        if file:
            assert (tmp_path / file).exists(), (name, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        (">&-", 0),
        (">&- 2>&-", 0),
        ("<&- >&- 2>&-", 0),
        (">/dev/full", 2),
        ("2>/dev/full", 0),
        (">/dev/full 2>/dev/full", 2),
        ("| head -1 >&2", 1),
    ],
)
def test_a_shell_that_redirects(redirected: str, code: int) -> None:
    command = f'"{sys.executable}" -c "from gigamorph.cli.entry import main; main()" plan --help {redirected}'
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode in ({0, 1} if "head" in redirected else {code})  # the pipe may take all of it
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if redirected == ">/dev/full":
        assert done.stderr == "error: cannot write the output: No space left on device; redirect it elsewhere\n"


def test_a_file_does_not_get_the_number_of_a_closed_output(tmp_path: Path) -> None:
    """What a library prints to number 1 would go into it."""
    code = (
        "import os, sys\n"
        "from gigamorph.cli.streams import guarded\n"
        "with guarded():\n"
        f"    file = open({str(tmp_path / 'a')!r}, 'w')\n"
        "    os.write(1, b'of a library')\n"
        "    assert [os.get_inheritable(number) for number in (0, 1, 2)] == [True] * 3\n"
        "    sys.exit(10 * (file.fileno() > 2))\n"
    )
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" <&- >&- 2>&-'], timeout=240)
    assert done.returncode == 10 and not (tmp_path / "a").read_text()


def test_letters_that_an_encoding_lacks(tmp_path: Path) -> None:
    with streams("ascii", "file", tmp_path) as written:
        assert run("plan", "--model", tmp_path / "Brüste", *SIZE) == 2
        assert run("recipe", "list") == 0
    assert "Br\\xfcste" in written.read_text() or "Brüste" in written.read_text()


def test_what_a_name_would_have_a_terminal_do(tmp_path: Path) -> None:
    """Set its title or the clipboard, that is; colours, which click removes here, pass."""
    (tmp_path / "t.csv").write_text("image_path,label\na\x1b]52;c;cm0=\x07\x9d0;b\x1b[31m.png,1\n")
    with streams("utf-8", "file", tmp_path) as written:
        run("data", "check", tmp_path / "t.csv")
    assert "a\\x1b]52;c;cm0=\\x07\\x9d0;b.png" in written.read_text()

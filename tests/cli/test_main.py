import builtins
import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import run
from forked import Forked, own_imports

import gigamorph
from gigamorph.cli import entry
from gigamorph.cli.main import _COMMANDS, cli, main
from gigamorph.engine.versions import versions_of_results


@pytest.mark.parametrize("command", sorted(_COMMANDS))
def test_every_help_has_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"Example: gigamorph {command}" in " ".join(capsys.readouterr().out.split())


def test_overview_names_every_command_and_imports_no_torch():
    code = (
        "import sys\n"
        "from gigamorph.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print('heavy', sorted({'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "heavy []" in done.stdout
    assert all(name in done.stdout for name in _COMMANDS)


def test_unknown_command_and_option(capsys):
    assert run("nope") == 2
    assert "nope" in capsys.readouterr().err
    assert run("plan", "--nope") == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nope"], "No such command 'nope'"),
        (["plan", "--nope"], "--nope"),
        (["train", "--lr", "0"], "Invalid value for '--lr': 0.0 is not in the range x>0 (gigamorph train --help)"),
        (["train", "--task", "x"], "'x' is not one of 'classes', 'labels', 'ordinal', 'numbers', 'masks' (gigamorph "),
        (["data", "index"], "Missing argument 'FOLDER' (gigamorph data index --help)"),
        (["predict"], "Missing argument 'CHECKPOINT' (gigamorph predict --help)"),
    ],
)
def test_what_an_option_cannot_be_is_one_line(args, told, capsys):
    assert run(*args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and said.count("\n") == 1


@pytest.fixture
def ctrl_c():
    """A shell that runs tests in the background has switched Ctrl-C off for all that they start."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, former)


def _swallow():
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    raise AttributeError("module 'numpy._core' has no attribute '_multiarray_umath'")


def test_what_fails_of_a_swallowed_ctrl_c_is_stopped_by_it(ctrl_c, monkeypatch, capsys):
    """As where a destructor swallows it: the command goes on, and misses later what it has not got."""
    monkeypatch.setattr(cli, "main", lambda *args, **kwargs: _swallow())
    assert run("doctor") == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_waits_for_an_import_once(presses, ctrl_c, tmp_path, monkeypatch, capsys):
    """PyTorch's compiled part ends the process where it is told just then, and matplotlib goes on."""
    inner = f"import os, signal\nfor _ in range({presses}): os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"pressed{presses}_inner.py").write_text(inner)
    outer = f"import builtins, pressed{presses}_inner\nbuiltins.ended = {presses}\n"
    (tmp_path / f"pressed{presses}.py").write_text(outer)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtins, "ended", 0, raising=False)

    def importing(*args, **kwargs):
        importlib.import_module(f"pressed{presses}")
        time.sleep(30)

    monkeypatch.setattr(cli, "main", importing)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    assert vars(builtins)["ended"] == (presses == 1) and sys.getprofile() is None


def test_ctrl_c_while_the_command_line_is_imported(monkeypatch, capsys):
    class Pressed:
        def find_spec(self, name, *where):
            if name == "gigamorph.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "gigamorph.cli.main")
    monkeypatch.delattr(gigamorph.cli, "main")
    monkeypatch.setattr(sys, "meta_path", [Pressed(), *sys.meta_path])
    with pytest.raises(SystemExit, match="130"):
        entry.main()
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_ctrl_c_is_130_and_faults_of_ours_keep_their_trace(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert run("doctor") == 130

    def faulty(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", faulty)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["train", "--help"]])
def test_a_reader_that_has_enough(args, monkeypatch):
    """As of `gigamorph | head -3`: no traceback; the exit code is click's, or that of a process ended by SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert run(*args) in (1, 2, 141)
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.usefixtures("named_rates")
@pytest.mark.parametrize("args", [["--help"], ["plan", "--model", "lesionnet", "--size", "64x64"]])
def test_an_output_that_takes_nothing(args, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        kept = os.dup(1)
        os.dup2(full.fileno(), 1)
        try:
            with os.fdopen(os.dup(1), "w") as stdout:
                monkeypatch.setattr(sys, "stdout", stdout)
                assert run(*args) == 2
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    error = capfd.readouterr().err
    assert error == "error: cannot write the output: No space left on device; redirect it elsewhere\n"


def test_version(capsys):
    assert run("--version") == 0
    assert "0." in capsys.readouterr().out


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_wants_them_to_spin(given, found, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run("--version") == 0
    assert os.environ["OMP_WAIT_POLICY"] == found


def test_a_shell_completes_commands_and_their_options(monkeypatch, capsys):
    def completed(words):
        monkeypatch.setenv("_GIGAMORPH_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main([])
        return {line.partition(",")[2] for line in capsys.readouterr().out.split()}

    assert {"plan", "predict"} <= completed("gigamorph p")
    assert completed("gigamorph train --sk") == {"--skip-bad"}


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch, tmp_path, capsys):
    found = importlib.metadata.Distribution.from_name

    def without_us(name):
        if name == "gigamorph":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_us)
    assert run("--version") == 0
    assert gigamorph.__version__ in capsys.readouterr().out
    table = "image_path,label,patient_id,split,log_odds_1\n"
    table += "".join(f"{n}.dcm,{n % 2},p{n},test,{n % 3}\n" for n in range(8))
    (tmp_path / "predictions.csv").write_text(table)
    assert run("eval", tmp_path / "predictions.csv", "--resamples", "20", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["versions"]["gigamorph"] == gigamorph.__version__
    assert versions_of_results()["gigamorph"] == gigamorph.__version__


def test_an_error_about_a_long_value_stays_short(tmp_path, capsys):
    (tmp_path / "images.csv").write_text(f"image_path,label,white\na.png,1,{'x' * 10**5}\n")
    assert run("data", "check", tmp_path / "images.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "line 2: white level 'xxx" in line and "4095 for 12 bits" in line
    assert " [...] " in line and len(line) < 2100


def test_training_and_prediction_import_neither_morphs_nor_the_application():
    imported = ["cli.train", "engine.train.fit", "engine.predict.run", "engine.trained"]
    process = Forked(own_imports, [f"gigamorph.{name}" for name in imported])
    assert process.wait() == 0, process.error
    found = process.output.split()
    assert "gigamorph.engine.train.fit" in found
    assert not [name for name in found if name.startswith(("gigamorph.engine.morph", "gigamorph.engine.mammography"))]

"""What is installed is what is here, the door leads to it, and imports go down from folder to folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import gigamorph
from gigamorph.engine.versions import release

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "engine", "kernels")  # from above


def test_every_package_is_named():
    """An editable installation finds packages that a wheel would lack."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        "gigamorph." + ".".join(file.parent.relative_to(ROOT).parts)
        for top in FOLDERS
        for file in (ROOT / top).rglob("__init__.py")
    }
    data = {
        "gigamorph.engine.mammography.recipes.configs",
        "gigamorph.engine.report.templates",
        "gigamorph.engine.mammography.view.page",
    }  # else setuptools warns
    assert set(settings["packages"]) == {"gigamorph", *here, *data}


def test_the_door_leads_to_every_name():
    tree = ast.parse((ROOT / "gigamorph" / "__init__.py").read_text())
    typed = {
        alias.name: f"gigamorph.{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
    assert set(typed) == set(gigamorph.__all__) <= set(dir(gigamorph))
    for name, home in typed.items():
        assert getattr(gigamorph, name) is getattr(sys.modules[home], name)
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        _ = gigamorph.acelerate


def test_the_door_is_light():
    """`gigamorph --help` must not wait for PyTorch."""
    code = "import gigamorph, gigamorph.cli.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkout_is_whole(tmp_path: Path):
    """Python started in a checkout takes all of `gigamorph` from it, whatever else is installed."""
    for file in ("gigamorph/__init__.py", "engine/__init__.py", "engine/errors.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    code = "import gigamorph; print(gigamorph.DataError.__module__, gigamorph.engine.errors.__file__)"
    told = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert told.split() == ["gigamorph.engine.errors", str(tmp_path / "engine" / "errors.py")]


def test_a_wheel_trains_and_loads(tmp_path: Path):
    """Installed from its wheel, outside of the checkout: data, a training, `load`, and a page of the viewer."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for name in ("pyproject.toml", "PYPI.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("gigamorph", *FOLDERS):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(build, check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    assert (tmp_path / "site" / "gigamorph" / "engine" / "tiling" / "arena.cpp").exists()  # or the heap would serve
    code = """
from pathlib import Path
import gigamorph
from gigamorph.cli.main import _run
from gigamorph.engine.mammography.phantom import write_phantoms

table = write_phantoms("study", patients=6, height=128, width=96)
options = "--model lesionnet?stages=1 --mean 0.3 --std 0.1 --epochs 1 --memory-budget 64MiB --quiet --out run"
assert _run(["train", str(table), *options.split()]) == 0
assert _run(["predict", "run/best.ckpt", str(table), "--out", "predicted"]) == 0
assert _run(["eval", "predicted", "--split", "all", "--resamples", "5", "--out", "measured"]) == 0
assert _run(["view", "predicted", "--static", "--no-browser", "--out", "page"]) == 0
assert _run(["recipe", "list"]) == 0
trained = gigamorph.load("run/best.ckpt", memory_budget="64MiB")
found = trained.predict(sorted(Path("study/images").iterdir())[:1])
assert trained.classes == ("0", "1") and abs(found.sum() - 1) < 1e-9
print(gigamorph.__file__)
"""
    (tmp_path / "work").mkdir()
    where = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, check=False, cwd=tmp_path / "work", env=where, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "site" / "gigamorph" / "__init__.py")


def test_the_source_distribution_tests_itself(tmp_path: Path):
    """It has the tests, and what they read."""
    tree = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tree or release(version("setuptools")) < (77,):
        pytest.skip("no checkout, or setuptools before 77")
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    for name in tree:
        if not name.startswith("benchmarks/results/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
    shutil.unpack_archive(archive, tmp_path / "unpacked", **safe)
    (own,) = (tmp_path / "unpacked").iterdir()
    left_out = (".ci/", ".github/", ".git", "benchmarks/results/")
    assert [name for name in tree if not name.startswith(left_out) and not (own / name).exists()] == []
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/test_versions.py"]
    ran = subprocess.run(
        pytest_, check=False, cwd=own, env={**os.environ, "PYTHONPATH": str(own)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout


def test_the_page_of_the_index_has_no_link_into_the_repository():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"] == "PYPI.md"
    assert re.findall(r"\]\((?!https://)", (ROOT / "PYPI.md").read_text()) == []


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("from gigamorph import accelerate", "gigamorph.accelerate needs the package torch; install all that it needs"),
        ("from gigamorph.cli.entry import main; main()", "error: the package torch is missing; install it, or all"),
    ],
)
def test_without_pytorch_there_is_one_clear_line(use: str, message: str):
    code = f"import sys; sys.modules['torch'] = None; import gigamorph; {use}"
    ran = subprocess.run([sys.executable, "-c", code, "doctor"], check=False, capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1
    assert message in last and last.endswith("pip install gigamorph")


def test_one_version():
    """The door's is the wheel's (`dynamic`), and the citation's."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    assert f"\nversion: {gigamorph.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_is_a_command():
    told = subprocess.run([sys.executable, "-m", "gigamorph", "--version"], check=True, capture_output=True, text=True)
    assert told.stdout.startswith("gigamorph, version ")


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down_from_folder_to_folder(folder: str):
    """Within a folder import-linter sees to it (`make lint`)."""
    for file in (ROOT / folder).rglob("*.py"):
        depth = len(file.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:  # relative to `gigamorph`
                targets = [node.module] if node.module else [alias.name for alias in node.names]
                for target in targets:
                    assert target.split(".")[0] in FOLDERS[FOLDERS.index(folder) + 1 :], f"{file}: {target}"

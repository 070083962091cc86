"""The core of the test suite on several releases of PyTorch, each with its Triton, in an environment of its own.

    python tests/releases.py                        # the newest release that pip offers: make test-newest
    python tests/releases.py 2.11.0 2.12.1 --quick --json benchmarks/results/releases.json

An environment is made once, in build/releases; a second run uses it again, and brings "newest" up to date. The table
and the JSON file have the numbers of tests that passed, failed, were refused by an older TorchDynamo (conftest.py), and
were skipped, by release and package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
CORE = ("capture", "module", "execution", "lowering", "tiling", "planning", "morph", "cuda_graphs", "train", "images")
FOLDERS = [f"tests/engine/{name}" for name in CORE] + ["tests/kernels"]
PACKAGES = ("torch", "torchvision", "triton", "numpy", "lightning", "timm", "zarr", "pydicom", "tifffile")
_VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{"python": platform.python_version()}} | {{name: version(name) for name in {PACKAGES}}}))
"""


def environment(release: str, folder: Path, base: str) -> Path:
    """The Python of an environment with a release of PyTorch; it is made if it does not exist.

    Args:
        release: such as "2.14.1", or "newest".
        folder: of all environments.
        base: the Python that makes it.
    """
    python = folder / release / "bin" / "python"
    if release == "newest" or not (folder / release / "installed").exists():
        wanted = ["--upgrade", "torch"] if release == "newest" else [f"torch=={release}"]
        print(f"{release}: installing", file=sys.stderr, flush=True)
        subprocess.run([base, "-m", "venv", folder / release], check=True)
        for packages in (["--upgrade", "pip"], [*wanted, "torchvision"], [*wanted[-1:], "-e", f"{ROOT}[models,dev]"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / release / "installed").touch()
    return python


def tested(python: Path, options: list[str], workers: str, times: Path) -> dict:
    """Run the tests: the versions, and what `counted` finds."""
    changed = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    versions = subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True, cwd=ROOT)
    times.unlink(missing_ok=True)  # if pytest fails to start, an earlier run must not count
    pytest = [python, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider"]
    subprocess.run([*pytest, f"--junitxml={times}", *options], cwd=ROOT, env=changed, check=False)
    return json.loads(versions.stdout) | counted(times)


def counted(times: Path) -> dict:
    """Of a JUnit file, the numbers of tests by package and outcome, and the names of those that failed."""
    packages: dict[str, Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(times).getroot().iter("testcase"):
        parts = case.get("classname", "").split(".")[1:]
        package = parts[1] if parts[0] == "engine" and len(parts) > 2 else parts[0]
        outcome = "failed" if {"failure", "error"} & {one.tag for one in case} else "passed"
        if (skipped := case.find("skipped")) is not None:
            outcome = "refused" if skipped.get("message", "").startswith("refused: ") else "skipped"
        packages.setdefault(package, Counter())[outcome] += 1
        if outcome == "failed":
            failures.append(f"{'.'.join(parts)}.{case.get('name')}")
    return {"packages": {name: dict(count) for name, count in packages.items()}, "failures": failures}


def table(found: dict[str, dict]) -> str:
    """Rows of packages and columns of releases; a cell is passed / failed / refused / skipped."""
    lines = ["| | " + " | ".join(f"torch {one['torch']}" for one in found.values()) + " |"]
    lines.append("|---|" + "---|" * len(found))
    for name in ("python", *PACKAGES[2:]):
        lines.append(f"| {name} | " + " | ".join(one[name] for one in found.values()) + " |")
    for package in sorted({package for one in found.values() for package in one["packages"]}):
        cells = (one["packages"].get(package, {}) for one in found.values())
        shown = (
            " / ".join(str(cell.get(name, 0)) for name in ("passed", "failed", "refused", "skipped")) for cell in cells
        )
        lines.append(f"| `{package}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=["newest"], help="of PyTorch, such as 2.14.1")
    parser.add_argument("--quick", action="store_true", help="all packages, but only tests that are fast")
    parser.add_argument("--python", default=sys.executable, help="the Python that makes the environments")
    parser.add_argument("--workers", default="auto", help="processes of tests at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "releases", help="of the environments")
    parser.add_argument("--json", type=Path, help="file of results; other releases in it stay")
    given = parser.parse_args()
    stored = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    found = {}
    for release in given.releases:
        python = environment(release, given.folder, given.python)
        options = ["-m", "not slow"] if given.quick else FOLDERS
        found[release] = tested(python, options, given.workers, given.folder / f"{release}.xml")
        if given.json:
            stored[found[release]["torch"]] = {"quick": given.quick} | found[release]
            given.json.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    print(table(found))
    failures = [f"torch {one['torch']}: {name}" for one in found.values() for name in one["failures"]]
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

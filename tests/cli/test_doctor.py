import inspect
import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from gigamorph import accelerate
from gigamorph.cli.bench import step
from gigamorph.cli.health import PACKAGES, Machine, facts, problems
from gigamorph.cli.main import main
from gigamorph.engine.versions import TESTED

HEALTHY = Machine(
    versions=dict.fromkeys(PACKAGES, "2.6.6"),
    import_errors={},
    cuda_build=None,
    gpus=(),
    driver=None,
    cores=8,
    threads=8,
    memory=2**34,
    shm=2**33,
)
CUDA = replace(HEALTHY, cuda_build="13.0", gpus=("H200, 139 GiB, sm_90",), driver="580.1, H200")


def without(machine, name):
    return replace(machine, versions={k: v for k, v in machine.versions.items() if k != name})


def test_healthy_machines_have_no_problem():
    assert problems(HEALTHY) == [] and problems(CUDA) == []
    assert dict(facts(CUDA))["will use"].startswith("cuda")
    assert dict(facts(HEALTHY))["will use"] == "cpu: this torch is a CPU build"


@pytest.mark.parametrize(
    ("machine", "level", "what", "fix"),
    [
        (
            replace(HEALTHY, import_errors={"torchvision": "operator torchvision::nms does not exist"}),
            "warning",
            "was not built for torch",
            "whl/cpu",
        ),
        (
            replace(CUDA, import_errors={"torchvision": "operator torchvision::nms does not exist"}),
            "warning",
            "was not built for torch",
            "whl/cu130",
        ),
        (replace(HEALTHY, import_errors={"torchvision": "libX.so"}), "warning", "libX.so", "torchvision"),
        (replace(CUDA, gpus=(), driver=None), "warning", "CUDA 13.0, but finds no GPU", "driver"),
        (replace(CUDA, gpus=()), "warning", "CUDA 13.0, but finds no GPU", "update the driver"),
        (replace(HEALTHY, driver="580.1, H200"), "warning", "CPU build", "pip install"),
        (
            replace(CUDA, kernels_lack="triton is not installed; pip install triton"),
            "warning",
            "own ops run on the GPU: triton is not installed",
            "pip install triton",
        ),
        (
            replace(CUDA, failed_kernels=("conv2d [64]: RuntimeError: ptxas died", "pool [3]: x")),
            "warning",
            "ptxas died, and 1 more",
            "gigamorph bench kernels",
        ),
        (replace(HEALTHY, threads=1), "warning", "1 thread on 8 cores", "OMP_NUM_THREADS"),
        (replace(HEALTHY, threads=64), "warning", "64 threads on 8 usable cores", "OMP_NUM_THREADS=8"),
        (replace(HEALTHY, arena_lacks="no C++ compiler; install g++ or set CXX"), "warning", "no C++ compiler", "g++"),
        (
            replace(HEALTHY, arena_lacks="g++ cannot build it: x"),
            "warning",
            "under a budget: g++ cannot",
            "apt install",
        ),
        (replace(HEALTHY, shm=2**26), "warning", "/dev/shm has 64.0 MiB", "--shm-size"),
        (without(HEALTHY, "lightning"), "error", "lightning is not installed", ">=2.6.6"),
        (replace(HEALTHY, versions={**HEALTHY.versions, "lightning": "2.6.3"}), "error", "malware", ">=2.6.6"),
        (replace(HEALTHY, import_errors={"lightning": "boom"}), "error", "boom", ">=2.6.6"),
        (
            replace(HEALTHY, missing_names=(("torch._foreach_copy_", "they are copied one by one"),)),
            "warning",
            "has no torch._foreach_copy_: they are copied one by one",
            "install torch 2.11 to",
        ),
        (
            replace(HEALTHY, difference="the output differs by 1e-03"),
            "error",
            "self-test fails: the output differs by 1e-03",
            "install torch",
        ),
        (without(HEALTHY, "imagecodecs"), "error", "imagecodecs is missing", "pip install"),
        (replace(HEALTHY, import_errors={"imagecodecs": "x"}), "error", "imagecodecs", "pip install"),
    ],
)
def test_each_trap_is_named_with_its_fix(machine, level, what, fix):
    [problem] = problems(machine)
    assert problem.level == level and what in problem.what and fix in problem.fix


def with_versions(**versions):
    return replace(HEALTHY, versions={**HEALTHY.versions, **versions})


def test_packages_newer_than_those_tested_are_named_with_the_self_check():
    assert problems(with_versions(torch="2.15.9+cpu", triton="3.9.1")) == []
    [problem] = problems(with_versions(torch="2.16.0.dev1+cu130", triton="3.10.0"))
    assert problem.level == "warning"
    assert problem.what == (
        "torch 2.16.0.dev1+cu130 and triton 3.10.0: newer than the tested versions "
        "(torch 2.11 to 2.15, triton 3.6 to 3.9)"
    )
    assert problem.fix.endswith("pip install 'torch==2.15.*' 'triton==3.9.*'")
    assert "verify=True" in problem.fix and "verify" in inspect.signature(accelerate).parameters
    command = problem.fix.partition("gigamorph bench ")[2].partition(";")[0].split()
    with step.make_context("step", command[1:]) as context:  # as its parser takes it
        assert context.params["peers"] == ("stock", "gigamorph")
    [problem] = problems(with_versions(torch="2.16.0"))
    assert problem.what.startswith("torch 2.16.0: newer") and "triton" not in problem.what


def test_tested_versions_begin_with_the_oldest_that_can_be_installed():
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, tested in TESTED.items():
        assert any(line.partition(";")[0] == f"{name}>={tested.oldest}" for line in wanted)


def test_version_with_a_suffix_is_no_old_one():
    assert problems(replace(HEALTHY, versions={**HEALTHY.versions, "lightning": "2.7.0rc1+local"})) == []


def test_each_private_name_of_pytorch_that_is_missing_is_shown(monkeypatch):
    from gigamorph.engine import self_test
    from gigamorph.engine.torch_private import NAMES, PrivateName

    find = PrivateName.find

    def find_others(name):
        if name.path == lost:
            raise name.error()
        return find(name)

    monkeypatch.setattr(PrivateName, "find", find_others)
    for lost, name in NAMES.items():
        found = self_test.missing()
        assert [one.path for one in found] == [lost]
        [problem] = problems(replace(HEALTHY, missing_names=tuple((one.path, one.without) for one in found)))
        assert problem.what == f"PyTorch 2.6.6 has no {lost}: {name.without}"
        assert problem.level == "warning" and problem.fix.startswith("install torch 2.11 to")


@pytest.mark.parametrize(("machine", "code"), [(HEALTHY, 0), (without(HEALTHY, "lightning"), 1)])
def test_command_shows_facts_and_exits_by_what_it_found(machine, code, monkeypatch, capsys):
    import gigamorph.cli.health as health

    monkeypatch.setattr(health, "probe", lambda: machine)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == code
    out = capsys.readouterr().out
    assert "will use" in out and ("error: lightning is not installed" in out) == bool(code)


def test_this_machine_can_be_probed():
    from gigamorph.cli.health import probe

    machine = probe()
    assert machine.cores >= 1 and machine.memory > 0 and "torch" in machine.versions


def test_doctor_for_machines_and_for_bug_reports(capsys):
    codes = []
    for options in (["--json"], ["--report"], ["--json", "--report"]):
        with pytest.raises(SystemExit) as caught:
            main(["doctor", *options])
        codes.append(caught.value.code)
        told = capsys.readouterr()
        if options == ["--json"]:
            found = json.loads(told.out)
            assert found["machine"]["versions"]["torch"] in found["facts"]["torch"] and "problems" in found
        elif options == ["--report"]:
            assert "### Machine" in told.out and "packages: gigamorph" in told.out
            assert str(Path.home()) not in told.out and os.getcwd() not in told.out
    assert codes[0] == codes[1] in (0, 1) and codes[2] == 2

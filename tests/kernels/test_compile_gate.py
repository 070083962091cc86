"""The compile gate passes on the package's kernels and fails on planted faults.

The gate needs Triton's compiler, which a process that has imported Triton for interpreting lacks: everything runs in
one child without TRITON_INTERPRET. As a script, this file prints what the child finds, as JSON in its last line.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@triton.jit
def _product_kernel(
    x_desc,
    w_desc,
    y_desc,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TURNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """y = x w^T. TURNED: x is loaded through a box that the compiler cannot fold. SCALED: y = 2 x w^T."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = x_desc.load([m // 16, 0, k]).reshape(BM, BK) if TURNED else x_desc.load([m, k])
        if SCALED:
            a = (2 * a.to(tl.float32)).to(a.dtype)
        w = w_desc.load([n, k])
        acc = tl.dot(a, w.T, acc)
    y_desc.store([m, n], acc.to(y_desc.dtype))


@triton.jit
def _blocks_kernel(x_ptr, w_ptr, y_ptr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = relu(x) w^T summed over blocks of w: the left operand is computed before the loop."""
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN), tl.arange(0, BK)[None, :]
    a = tl.load(x_ptr + m * BK + k)
    a = tl.where(a <= 0, 0.0, a)
    acc = tl.zeros((BM, BN), tl.float32)
    for b in range(COUNT):
        w = tl.load(w_ptr + (b * BN + n[:, None]) * BK + k)
        acc = tl.dot(a, w.T, acc)
    tl.store(y_ptr + m * BN + n[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def _sums_kernel(x_ptr, y_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Holds far more values than there are registers."""
    at = tl.arange(0, BLOCK)
    a, b, c = tl.load(x_ptr + at), tl.load(x_ptr + BLOCK + at), tl.load(x_ptr + 2 * BLOCK + at)
    for _ in range(COUNT):
        a, b, c = tl.exp(b) + c, tl.exp(c) + a, tl.exp(a) + b
    tl.store(y_ptr + at, a + b + c)


@triton.jit
def _rows_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """32-bit addresses."""
    at = tl.program_id(0) * width + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def _product(
    rows: int = 4096,
    bm: int = 128,
    bn: int = 128,
    stages: int = 3,
    turned: bool = False,
    scaled: bool = False,
    grid=None,
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, w, y = (torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta") for _ in range(3))
    source = TensorDescriptor.from_tensor(x, [bm, 64])
    if turned:
        source = TensorDescriptor.from_tensor(x.view(rows // 16, 16, 1024), [bm // 16, 16, 64])
    _product_kernel[grid or (rows // bm, 1024 // bn)](
        source,
        TensorDescriptor.from_tensor(w, [bn, 64]),
        TensorDescriptor.from_tensor(y, [bm, bn]),
        1024,
        bm,
        bn,
        64,
        turned,
        scaled,
        num_warps=8 if bm >= 128 else 4,
        num_stages=stages,
    )


def _blocks(bm: int) -> None:
    x = torch.empty(1 << 16, dtype=torch.bfloat16, device="meta")
    _blocks_kernel[(1,)](x, x, x, 8, bm, 64, 64, num_warps=4, num_stages=3)


def _sums() -> None:
    x = torch.empty(3 * 16384, device="meta")
    _sums_kernel[(1,)](x, x, 2, 16384, num_warps=4)


@triton.jit
def _clamp_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n)
    y = tl.where(x <= 0.0, 0.0, x) if EXACT else tl.maximum(x, 0.0)
    tl.store(y_ptr + n, y)


def _clamp(exact: bool) -> None:
    x = torch.empty(128, device="meta")
    _clamp_kernel[(1,)](x, x, 128, exact)


def _rows(height: int) -> None:
    x = torch.empty(height, 1 << 16, device="meta", dtype=torch.bfloat16)
    _rows_kernel[(height,)](x, x, 1 << 16, 128)


def _double() -> None:
    """A convolution whose products are not made by tensor cores: their operands lie in registers."""
    from gigamorph.kernels.conv2d_forward import launch
    from gigamorph.kernels.windows import ConvGeometry

    x, y = (torch.empty(1, 125, 125, c, dtype=torch.float64, device="meta").permute(0, 3, 1, 2) for c in (96, 384))
    launch(x, torch.empty(384, 96, 1, 1, dtype=torch.float64, device="meta"), y, ConvGeometry(), "none")


def _stem() -> None:
    """The first layers on an image of one channel."""
    from gigamorph.kernels.stem_kernels import stem_forward
    from gigamorph.kernels.stem_reference import Stem
    from gigamorph.kernels.windows import ConvGeometry

    image, weight = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((1, 1, 512, 512), (64, 1, 7, 7))
    )
    stem = Stem(image, weight, None, ConvGeometry(2, 2, 3, 3, 3, 3), (1, 1, 1, 1), "relu")
    y, spots = (torch.empty(1, 128, 128, 64, dtype=d, device="meta") for d in (torch.bfloat16, torch.uint8))
    stem_forward(stem, y.permute(0, 3, 1, 2), spots.permute(0, 3, 1, 2))


_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# name: (launch, what the verdict must contain; "" for none)
PLANTED = {
    "good": (_product, ""),
    "shared": (lambda: _product(bm=256, stages=6), "shared memory"),
    "spills": (_sums, "spills"),
    "wgmma": (lambda: _product(bm=32), "no wgmma"),
    "operand": (lambda: _product(turned=True), "left operand in registers"),
    "in flight": (lambda: _product(scaled=True), "register operand in flight"),
    "awaited": (lambda: _product(scaled=True, stages=1), ""),
    # Triton 3.8 moves a part of the constant operand to its registers within the loop.
    "constant": (lambda: _blocks(64), "register operand in flight" if _TRITON == (3, 8) else ""),
    "few rows": (lambda: _blocks(32), ""),
    "grid": (lambda: _product(grid=(1, 1 << 16)), "grid"),
    "overflow": (lambda: _rows(1 << 16), "may reach 4,29"),
    "fits": (lambda: _rows(1 << 14), ""),
    "no matrix unit": (_double, ""),
    "NaN dropped": (lambda: _clamp(False), "drops NaN"),
    "NaN kept": (lambda: _clamp(True), ""),
    "stem": (_stem, ""),
    "compiler": (lambda: _product(bm=96), "power of 2"),
}


# On other chips products of matrices alone: they are another instruction there. `make gate` has the rest.
CHIPS = (("90",), ("80", "--only", "conv2d_dgrad"), ("942", "--only", "stem_gradients"))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "printed": done.stdout}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(found, name):
    wanted, verdict = PLANTED[name][1], found["planted"][name]
    assert wanted in verdict and bool(wanted) == bool(verdict), verdict


def test_quick_gate_passes(found):
    assert found["codes"] == [0] * len(CHIPS), found["printed"][-4000:]
    assert len(re.findall("^ok: ", found["printed"], re.MULTILINE)) == len(CHIPS)


def test_a_step_is_recorded_for_several_chips_as_for_each_alone(found):
    assert found["alike"] == {"training": True, "inference": True} and found["chips differ"]


def test_multiplications_and_additions_are_fused_whatever_the_default_of_triton(found):
    assert found["fused"] == [True]


def test_a_new_size_compiles_nothing(found):
    """benchmarks/recorded_step.py: another size of an image compiles nothing and measures next to nothing."""
    first, same, *others = found["sizes"]
    assert first["compiled"] >= 8 and first["measured"] >= 8
    assert same["compiled"] == same["measured"] == 0
    assert all(row["compiled"] <= 2 and row["measured"] <= 4 for row in others), others


def test_refuses_to_interpret(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # the module sets it
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(sys, "argv", ["compile_gate.py"])
    import compile_gate

    with pytest.raises(SystemExit) as caught:
        compile_gate.main()
    assert caught.value.code == 2 and "unset it" in capsys.readouterr().err


def _outer_stages() -> nn.Module:
    """ResNet-18 without the stages of 128 and 256 channels: what is compiled for those alone, `make gate` has."""
    from gigamorph.engine.models.resnet import BasicBlock, resnet18

    model = resnet18()
    model.layer2 = model.layer3 = nn.Identity()
    skip = nn.Sequential(nn.Conv2d(64, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
    model.layer4[0] = BasicBlock(64, 512, 2, skip)
    return model


def _pair() -> nn.Module:
    """Two convolutions that are one in inference where the chip has descriptors."""
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 256, 1), nn.BatchNorm2d(256))


def _sized() -> nn.Module:
    """A network of convolutions, pooling and a norm, which is recorded at several sizes."""
    layers: list[nn.Module] = []
    for wide, narrow, stride in ((3, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(wide, narrow, 3, stride, 1), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1, 1), nn.Conv2d(64, 64, 5, 1, 2, groups=64), nn.GroupNorm(4, 64), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()


def _find() -> dict[str, Any]:
    """Everything in one process; what it imports and compiles first, the gate's own processes inherit."""
    import compile_gate
    from recorded_step import start_up

    planted = {}
    for name, (launch, _) in PLANTED.items():
        rows = compile_gate.gate(90, [(name, launch)])
        planted[name] = "; ".join(fault for row in rows for fault in row.faults)
    compile_gate.NETWORKS |= {"resnet18": _outer_stages, "pair": _pair}
    codes = []  # before any backward here: autograd's threads forbid the gate's processes
    for chip in CHIPS:
        sys.argv[1:] = ["--quick", "--faults", "--chip", *chip]
        codes.append(compile_gate.main())
    alike, alone = {}, {}
    for training in (True, False):
        scene = compile_gate.Scene("pair", False, training, "bf16", (128, 96), 64)
        alone = {chip: compile_gate.record(scene, [chip])[chip] for chip in compile_gate.CHIPS}
        together = compile_gate.record(scene, compile_gate.CHIPS)
        alike["training" if training else "inference"] = together == alone
    sizes = start_up(_sized, 256, 90, [(1024, 1024), (1024, 1024), (1000, 968), (917, 1011)])
    triton.knobs.language.default_fp_fusion = False
    with compile_gate.compile_only(80) as launches:  # for which it is not compiled yet
        _stem()
    compiled = {launch.kernel.metadata.enable_fp_fusion for launch in launches}
    return {
        "planted": planted,
        "codes": codes,
        "alike": alike,
        "chips differ": alone[80] != alone[90],
        "fused": list(compiled),
        "sizes": sizes,
    }


if __name__ == "__main__":
    print(json.dumps(_find()))

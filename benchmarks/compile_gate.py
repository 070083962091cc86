"""Every kernel launch of a training step of ResNet-50 and ConvNeXt-T, compiled for sm_80 and sm_90 without a GPU.

Whatever cannot run or cannot be fast on a GPU is a fault and makes the exit code 1:

    shared memory or grid beyond the chip's limits        a product of matrices without wgmma (sm_80: mma)
    registers spilled to memory                           wgmma that ptxas has serialized
    32-bit integers that may overflow at these sizes      wgmma with its left operand in registers although it was
    descriptors that did not become TMA loads             loaded by a descriptor and used unchanged
    registers that a loop rewrites while wgmma may still read them (triton-lang/triton#9433)

The launches are those of whole mammograms (4096 x 3328), of a tile of 2048 x 2048 whose maps are windows of buffers
with margins (as a gigapixel image is processed), and of whole maps of 32768 x 32768, on meta tensors. The last line
holds the worst figures.

    python benchmarks/compile_gate.py [--quick] [--only conv2d_forward,pool] [--match g32] [--chip 90] [--faults]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Everything is compiled afresh, so that ptxas reports on everything.
_cache = tempfile.TemporaryDirectory(prefix="compile_gate_")
os.environ["TRITON_CACHE_DIR"] = _cache.name
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import triton  # noqa: E402
from compile_only import Launch, compile_only, overflows, read_code  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from gigamorph.kernels import batch_norm as norm  # noqa: E402
from gigamorph.kernels import conv2d_dgrad as dense_dgrad  # noqa: E402
from gigamorph.kernels import conv2d_forward as dense_forward  # noqa: E402
from gigamorph.kernels import conv2d_wgrad as dense_wgrad  # noqa: E402
from gigamorph.kernels import conv_conv1x1 as tails  # noqa: E402
from gigamorph.kernels import depthwise as depth  # noqa: E402
from gigamorph.kernels import layer_norm as channels_norm  # noqa: E402
from gigamorph.kernels import layer_norm_linear as norm_linear  # noqa: E402
from gigamorph.kernels import moments as statistics  # noqa: E402
from gigamorph.kernels import normalized_conv1x1 as normalized  # noqa: E402
from gigamorph.kernels import pointwise as points  # noqa: E402
from gigamorph.kernels import pool as pools  # noqa: E402
from gigamorph.kernels import stem as stems  # noqa: E402
from gigamorph.kernels.tuning import SHARED_LIMIT  # noqa: E402
from gigamorph.kernels.windows import ConvGeometry  # noqa: E402

CHIPS = (80, 90)

# -- networks and sizes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution of a network; `level` is how many times smaller its input is than the image."""

    channels: int
    filters: int
    kernel: int
    stride: int
    level: int
    act: str
    residual: bool = False
    groups: int = 1

    def __str__(self) -> str:
        what = f"{self.channels}-{self.filters} {self.kernel}x{self.kernel}"
        more = (f"/{self.stride}", self.stride > 1), (f" g{self.groups}", self.groups > 1), (" +res", self.residual)
        return what + "".join(text for text, wanted in more if wanted) + f" at 1/{self.level}"


def resnet50() -> Iterator[Layer]:
    """All convolutions but the stem, each once."""
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        stride, level = (1, 4) if stage == 0 else (2, 2 ** (stage + 1))
        inner = level * stride
        yield Layer(channels, width, 1, 1, level, "relu")
        yield Layer(width, width, 3, stride, level, "relu")
        yield Layer(width, 4 * width, 1, 1, inner, "relu", residual=True)
        yield Layer(channels, 4 * width, 1, stride, level, "none")
        yield Layer(4 * width, width, 1, 1, inner, "relu")
        yield Layer(width, width, 3, 1, inner, "relu")
        channels = 4 * width


def convnext_tiny() -> Iterator[Layer]:
    """The 1x1 convolutions of its blocks and those between its stages."""
    for stage, width in enumerate((96, 192, 384, 768)):
        level = 4 * 2**stage
        yield Layer(width, 4 * width, 1, 1, level, "gelu")
        yield Layer(4 * width, width, 1, 1, level, "none", residual=True)
        if stage < 3:
            yield Layer(width, 2 * width, 2, 2, level, "none")


def others() -> Iterator[Layer]:
    """Convolutions that descriptors cannot address, and activations whose slope needs what they were applied to."""
    yield Layer(3, 64, 7, 2, 1, "relu")
    yield Layer(4, 96, 4, 4, 1, "none")
    yield Layer(128, 128, 3, 1, 4, "relu", groups=32)
    yield Layer(512, 512, 3, 2, 8, "relu", groups=32)
    yield Layer(100, 100, 3, 1, 8, "silu", residual=True)
    yield Layer(128, 128, 3, 1, 8, "silu", residual=True)
    yield Layer(64, 64, 5, 2, 4, "hardswish")


@dataclass(frozen=True)
class Scene:
    """An image size, and whether maps are windows of buffers with margins (then nothing is padded)."""

    name: str
    height: int
    width: int
    margin: int

    def map(self, channels: int, level: int, dtype: torch.dtype, extra: int = 0) -> Tensor:
        """A map at 1/level of the image's size, with `extra` more rows and columns in a window."""
        more = extra if self.margin else 0
        return window(channels, self.height // level + more, self.width // level + more, dtype, self.margin)


MAMMOGRAM = Scene("4096x3328", 4096, 3328, 0)
TILE = Scene("tile of 2048", 2048, 2048, 8)
GIGAPIXEL = Scene("32768x32768", 32768, 32768, 0)


def window(channels: int, height: int, width: int, dtype: torch.dtype, margin: int = 0) -> Tensor:
    """A map inside a buffer with a margin on all sides."""
    buffer = torch.empty(1, height + 2 * margin, width + 2 * margin, channels, dtype=dtype, device="meta")
    return buffer[:, margin : margin + height, margin : margin + width].permute(0, 3, 1, 2)


def filters(count: int, depth: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, rows, cols, depth, dtype=dtype, device="meta").permute(0, 3, 1, 2)


def vector(length: int) -> Tensor:
    return torch.empty(length, device="meta")


def weights(layer: Layer, dtype: torch.dtype) -> Tensor:
    return filters(layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel, dtype)


def tells(layer: Layer) -> bool:
    """Whether the slope of a layer's activation can be read off its output; else the forward keeps z too."""
    return layer.act in ("none", "relu", "relu6")


# -- launches -----------------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[], object]]
FAMILIES: dict[str, Callable[[bool], Iterator[Case]]] = {}


def family(launches: Callable[[bool], Iterator[Case]]) -> Callable[[bool], Iterator[Case]]:
    """Register a generator of (label, launch); its argument says whether a sample is enough."""
    FAMILIES[launches.__name__] = launches
    return launches


def convolutions(quick: bool) -> Iterator[tuple[Layer, Scene, torch.dtype]]:
    """Every layer in every scene in bfloat16, some in float32 and some on whole gigapixel maps."""
    if quick:  # a 3x3 of either dtype, one whose slope is read from z, and the 1x1 and 2x2/2 of ConvNeXt
        layers = [layer for layer in (*convnext_tiny(), *others()) if layer.level == 8 and layer.channels in (128, 192)]
        yield Layer(128, 128, 3, 1, 8, "relu"), TILE, torch.float32
    else:
        layers = [*resnet50(), *convnext_tiny(), *others()]
    for layer in layers:
        for scene, dtype in scenes(quick, layer.level == 4 or (layer.kernel == 3 and not layer.residual)):
            if scene is not GIGAPIXEL or layer.level == 4:
                yield layer, scene, dtype


def scenes(quick: bool, single: bool) -> Iterator[tuple[Scene, torch.dtype]]:
    """Sizes and dtypes; float32 too if `single`. A sample is in bfloat16."""
    yield TILE, torch.bfloat16
    if single and not quick:
        yield TILE, torch.float32
    if not quick:
        yield MAMMOGRAM, torch.bfloat16
        yield GIGAPIXEL, torch.bfloat16


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def maps_of(layer: Layer, scene: Scene, dtype: torch.dtype) -> tuple[Tensor, Tensor, ConvGeometry]:
    """Input and output of a layer, and where its filter lies."""
    carry = layer.kernel - layer.stride
    pad = 0 if scene.margin or carry <= 0 else layer.kernel // 2
    x = scene.map(layer.channels, layer.level, dtype, max(carry, 0))
    geometry = ConvGeometry.of((layer.stride,) * 2, (pad,) * 4, groups=layer.groups)
    return x, scene.map(layer.filters, layer.level * layer.stride, dtype), geometry


@family
def conv2d_forward(quick: bool) -> Iterator[Case]:
    for layer, scene, dtype in convolutions(quick):
        x, y, geometry = maps_of(layer, scene, dtype)

        def launch(layer=layer, x=x, y=y, geometry=geometry) -> None:
            dense_forward.launch(
                x,
                weights(layer, y.dtype),
                y,
                geometry,
                layer.act,
                scale=vector(layer.filters),
                shift=vector(layer.filters),
                residual=torch.empty_like(y) if layer.residual else None,
                z=None if tells(layer) else torch.empty_like(y),
            )

        yield f"{layer}, {scene.name}, {short(dtype)}", launch


@family
def conv2d_moments(quick: bool) -> Iterator[Case]:
    """The convolutions in front of a BatchNorm in training: as they are, with statistics of their output."""
    layers = [layer for layer in resnet50() if not quick or str(layer) == "128-128 3x3 at 1/8"]
    for layer in layers:
        for scene, dtype in scenes(quick, layer.kernel == 3):
            if scene is GIGAPIXEL and layer.level > 4:
                continue
            x, y, geometry = maps_of(layer, scene, dtype)

            def launch(layer=layer, x=x, y=y, geometry=geometry) -> None:
                dense_forward.launch(x, weights(layer, y.dtype), y, geometry, "none", moments=True)

            yield f"{layer}, {scene.name}, {short(dtype)}", launch


@family
def conv2d_dgrad(quick: bool) -> Iterator[Case]:
    for layer, scene, dtype in convolutions(quick):
        x, y, geometry = maps_of(layer, scene, dtype)

        def launch(layer=layer, x=x, y=y, geometry=geometry) -> None:
            dense_dgrad.dgrad(
                y,
                weights(layer, y.dtype),
                x,
                geometry,
                gate=None if layer.act == "none" else torch.empty_like(y),
                gate_act=layer.act,
                addend=torch.empty_like(x) if layer.kernel == 1 else None,
                mask=torch.empty_like(x),
                mask_act="relu",
            )

        if layer.level > 1:  # images want no gradient
            yield f"{layer}, {scene.name}, {short(dtype)}", launch


@family
def conv2d_wgrad(quick: bool) -> Iterator[Case]:
    for layer, scene, dtype in convolutions(quick):
        x, y, geometry = maps_of(layer, scene, dtype)

        def launch(layer=layer, x=x, y=y, geometry=geometry) -> None:
            gate = None if layer.act == "none" else torch.empty_like(y)
            sums = weights(layer, torch.float32), vector(layer.filters)
            dense_wgrad.launch(*sums, x, y, gate, layer.act, geometry)

        yield f"{layer}, {scene.name}, {short(dtype)}", launch


@family
def depthwise(quick: bool) -> Iterator[Case]:
    """ConvNeXt's 7x7, and the 3x3 of mobile networks, which is strided too."""
    sizes = [(96, 7, 1, 4, "none"), (96, 3, 2, 2, "relu6")]
    if not quick:
        sizes += [(32, 3, 1, 2, "relu6"), (144, 5, 2, 4, "hardswish")]
        sizes += [(192, 7, 1, 8, "none"), (384, 7, 1, 16, "none"), (768, 7, 1, 32, "none")]
    for channels, kernel, stride, level, act in sizes:
        layer = Layer(channels, channels, kernel, stride, level, act, groups=channels)
        for scene, dtype in scenes(quick, level == 4 or act == "relu6"):
            x, y, geometry = maps_of(layer, scene, dtype)
            z = None if tells(layer) else torch.empty_like(y)
            w = weights(layer, dtype)
            gate, v = None if act == "none" else z if z is not None else y, vector(channels)

            def launch(x=x, y=y, z=z, w=w, geometry=geometry, gate=gate, v=v, act=act) -> None:
                depth.forward(x, w, y, geometry, act, scale=v, shift=v, z=z)
                depth.dgrad(y, w, x, geometry, gate=gate, gate_act=act, addend=torch.empty_like(x))
                depth.wgrad(x, y, w.float(), v, geometry, gate=gate, gate_act=act)

            yield f"{layer}, {scene.name}, {short(dtype)}", launch


@family
def pool(quick: bool) -> Iterator[Case]:
    for channels, kernel, level in [(64, 3, 2)] if quick else [(64, 3, 2), (64, 2, 1), (256, 2, 4)]:
        layer = Layer(channels, channels, kernel, 2, level, "none")
        for scene, dtype in scenes(quick, True):
            x, y, geometry = maps_of(layer, scene, dtype)

            def launch(x=x, y=y, window=((kernel, kernel), geometry)) -> None:
                taps = torch.empty_like(y, dtype=torch.uint8)
                pools.launch_max_pool2d(x, *window, y=y)
                pools.launch_max_pool2d(x, *window, taps=taps, mask_act="relu")
                pools.launch_max_pool2d_backward(y, taps, x, *window)

            yield f"max {layer}, {scene.name}, {short(dtype)}", launch


@family
def pointwise(quick: bool) -> Iterator[Case]:
    for channels, level, act in [(256, 4, "relu")] if quick else [(256, 4, "relu"), (96, 4, "gelu"), (64, 1, "silu")]:
        for scene, dtype in scenes(quick, True):
            x = scene.map(channels, level, dtype)

            def launch(x=x, act=act) -> None:
                points.launch_act_grad(x, torch.empty_like(x), act, torch.empty_like(x))

            yield f"{act} of {channels} at 1/{level}, {scene.name}, {short(dtype)}", launch


@family
def batch_norm(quick: bool) -> Iterator[Case]:
    for channels, level in [(256, 4)] if quick else [(64, 2), (256, 4), (512, 32), (2048, 32)]:
        for scene, dtype in scenes(quick, level < 32):
            x, v = scene.map(channels, level, dtype), vector(channels)

            def launch(x=x, v=v) -> None:
                y = torch.empty_like(x)
                statistics.launch_moments(x)
                statistics.launch_moments_backward(x, v.double(), v, v, 1 << 30, y, y)
                norm.launch_normalize_act(x, v, v, v, v, None, "relu", y)
                norm.launch_normalize_act(x, v, v, v, v, y, "relu", y)
                norm.launch_normalize_act_gradients(y, x, v, v, v, v, None, "relu", y, None)
                norm.launch_normalize_act_gradients(y, x, v, v, v, v, None, "silu", y, None)
                norm.launch_normalize_act_gradients(y, x, v, v, v, v, y, "relu", y, y)

            yield f"{channels} at 1/{level}, {scene.name}, {short(dtype)}", launch


@family
def normalized_conv1x1(quick: bool) -> Iterator[Case]:
    """The last convolutions of ResNet-50's blocks behind a BatchNorm in training."""
    for width, level in [(128, 8)] if quick else [(64, 4), (128, 8), (256, 16), (512, 32)]:
        for scene, dtype in scenes(quick, level == 4):
            x, y, v = scene.map(width, level, dtype), scene.map(4 * width, level, dtype), vector(width)
            w = torch.empty(4 * width, width, dtype=dtype, device="meta")

            def launch(x=x, y=y, v=v, w=w) -> None:
                normalized.launch(x, v, v, v, v, "relu", w, None, y, True)
                normalized.launch(x, v, v, v, v, "silu", w, vector(w.shape[0]), y, False)

            yield f"{width}-{4 * width} at 1/{level}, {scene.name}, {short(dtype)}", launch


@family
def layer_norm(quick: bool) -> Iterator[Case]:
    for channels, level in [(96, 4)] if quick else [(96, 4), (192, 8), (384, 16), (768, 32)]:
        for scene, dtype in scenes(quick, level == 4):
            x, v = scene.map(channels, level, dtype), vector(channels)

            def launch(x=x, v=v, dtype=dtype) -> None:
                c, (_, _, h, w) = x.shape[1], x.shape
                weight, y = torch.empty(4 * c, c, dtype=dtype, device="meta"), window(4 * c, h, w, dtype)
                # Under autocast norms give float32 maps, and may read them.
                wide = torch.empty_like(x, dtype=torch.float32)
                channels_norm.launch_forward(x, v, v, 1e-6, torch.empty_like(x))
                channels_norm.launch_forward(x, v, v, 1e-6, wide)
                channels_norm.launch_forward(wide, v, v, 1e-6, wide)
                channels_norm.launch_backward(x, x, v, 1e-6, torch.empty_like(x))
                channels_norm.launch_backward(wide, x, v, 1e-6, torch.empty_like(x))
                channels_norm.launch_backward(wide, wide, v, 1e-6, wide)
                norm_linear.launch_linear_act(x, v, v, 1e-6, weight, vector(4 * c), "gelu", y)
                norm_linear.launch_linear_act(wide, v, v, 1e-6, weight, vector(4 * c), "gelu", y)

            yield f"{channels} at 1/{level}, {scene.name}, {short(dtype)}", launch


@family
def stem(quick: bool) -> Iterator[Case]:
    """From uint16 pixels: ResNet's 7x7/2 with pooling, 3x3/2, and patches of 4x4."""
    kinds = [(1, 64, 7, 2, True, "relu")]
    if not quick:
        kinds += [(3, 64, 7, 2, True, "relu"), (1, 32, 3, 2, False, "relu6"), (1, 96, 4, 4, False, "none")]
    for channels, count, kernel, stride, pooled, act in kinds:
        for scene, dtype in scenes(quick, True):
            padding = ((kernel - 1) // 2,) * 4 if kernel > stride else (0, 0, 0, 0)
            # Planes of single channels, as images are decoded; a tile is a window of the whole image.
            image = torch.empty(1, channels, GIGAPIXEL.height, GIGAPIXEL.width, dtype=torch.uint16, device="meta")
            image = image[:, :, : scene.height, : scene.width]
            y = scene.map(count, stride * (2 if pooled else 1), dtype)
            w = filters(count, channels, kernel, kernel, dtype)

            place = ConvGeometry.of((stride, stride), padding), (1, 1, 1, 1) if pooled else None

            def launch(image=image, w=w, y=y, place=place, act=act) -> None:
                v, gain = vector(w.shape[0]), vector(w.shape[1])
                whole = stems.Stem(image, w, v, v, gain, gain, -3.0, 3.0, *place, act)
                stems.stem_forward(whole, y)
                stems.stem_backward(whole, y, torch.empty_like(w, dtype=torch.float32), dscale=v, dshift=v)

            yield f"{channels}-{count} {kernel}x{kernel}/{stride}, {scene.name}, {short(dtype)}", launch


@family
def conv_conv1x1(quick: bool) -> Iterator[Case]:
    """The tails of ResNet-50's blocks, on chips with descriptors."""
    for width, stride, level in [(64, 1, 4)] if quick else [(64, 1, 4), (128, 2, 4), (128, 1, 8), (256, 1, 16)]:
        layer = Layer(width, width, 3, stride, level, "relu")
        for scene, dtype in scenes(quick, width < 256):
            x, h, geometry = maps_of(layer, scene, dtype)
            y = window(4 * width, *h.shape[2:], dtype)
            last = filters(4 * width, width, 1, 1, dtype)
            w, v, u = weights(layer, dtype), vector(width), vector(4 * width)

            def launch(x=x, y=y, w=w, v=v, u=u, last=last, geometry=geometry) -> None:
                if tails.conv_conv1x1_fits(x, w, last, y, geometry):
                    tails.conv_conv1x1_launch(x, w, v, last, u, torch.empty_like(y), y, geometry, "relu", "relu")

            yield f"{width}-{4 * width} 3x3/{stride} at 1/{level}, {scene.name}, {short(dtype)}", launch


# -- verdicts -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One compiled kernel and what is wrong with it."""

    family: str
    case: str  # the first launch that needs it
    chip: int
    kernel: str
    launches: int = 1
    shared: int = 0
    registers: int = 0
    warps: int = 0
    blocks: int = 0
    matrix: str = ""
    loads: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()


def plain_left_operands(ttir: str) -> bool:
    """Whether every product takes its left operand from a descriptor load, unchanged but for its shape.

    A transposed float32 operand does not count: wgmma transposes 16-bit operands only.
    """
    source = {m[1]: (m[2], m[3]) for m in re.finditer(r"(%\w+) = (tt\.[\w]+) (%\w+)", ttir)}
    lefts = re.findall(r"= tt\.dot (%\w+),.*? : tensor<(?:\d+x)+(\w+)> \*", ttir)
    for name, kind in lefts:
        while source.get(name, ("", ""))[0] in ("tt.reshape", "tt.trans"):
            if source[name][0] == "tt.trans" and kind == "f32":
                return False
            name = source[name][1]
        if source.get(name, ("", ""))[0] != "tt.descriptor_load":
            return False
    return bool(lefts)


def in_flight(ttgir: str) -> bool:
    """Whether a loop may rewrite registers while a product of its last turn still reads its left operand there.

    That is so if the operand is computed in the loop and the loop ends without a wait for the product: a wait leaves
    the last `pendings` products unfinished. Only what stands no deeper than the product runs after it for certain.
    """
    ends: list[int] = []  # indentation of the loops around a line
    home: dict[str, int] = {}  # number of loops around the definition of a name
    flying: list[list[int]] = []  # home of the operand, indentation of the product, products issued since
    for line in ttgir.splitlines():
        depth = len(line) - len(line.lstrip())
        if ends and depth == ends[-1] and line.lstrip().startswith("}"):
            if any(other[0] == len(ends) for other in flying):
                return True
            ends.pop()
        results, _, operation = line.partition(" = ")
        if results.lstrip().startswith("%"):
            same = re.match(r"tt\.(?:reshape|trans|split) (%\w+)", operation)  # other names for the same registers
            loops = home[same[1]] if same else len(ends)
            home.update((name, loops) for name in re.findall(r"%\w+", results))
        if "scf.for " in line:
            ends.append(depth)
            carried = re.search(r"iter_args\((.*?)\)", line)
            home.update((name, len(ends)) for name in re.findall(r"(%\w+) =", carried[1] if carried else ""))
        product = re.match(r"ttng\.warp_group_dot (%\w+).* : (!ttg|tensor)\b.* \* ", operation)
        wait = re.match(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", operation)
        for other in flying:
            other[2] += product is not None and depth <= other[1]
        if wait or (product and "isAsync = true" not in operation):
            pendings = int(wait[1]) if wait else 0
            flying = [other for other in flying if depth > other[1] or other[2] < pendings]
        elif product and product[2] == "tensor":
            flying.append([home[product[1]], depth, 0])
    return False


def wants_wgmma(ttir: str) -> bool:
    """Whether a product is one that wgmma can do: of 16-bit numbers, or of TF32 with a transposed right operand.

    wgmma takes 64 rows at least. Kernels with pointers may have fewer, for the channels of small groups.
    """
    transposed = re.findall(r"(%\w+) = tt\.trans", ttir)
    products = re.findall(r"= tt\.dot %\w+, (%\w+),.*? : tensor<(\d+)x(?:\d+x)*(\w+)> \*", ttir)
    tf32, described = "inputPrecision = tf32" in ttir, "tt.descriptor_load" in ttir
    return any(
        (kind in ("bf16", "f16") or (tf32 and right in transposed)) and (described or int(rows) >= 64)
        for right, rows, kind in products
    )


def faults(launch: Launch, chip: int) -> tuple[str, ...]:
    """What is wrong with a launch, in a few words each."""
    code, ttir = read_code(launch.kernel), launch.kernel.asm["ttir"]
    found = []
    if code.shared > SHARED_LIMIT[chip]:
        found.append(f"shared memory {code.shared:,} > {SHARED_LIMIT[chip]:,}")
    if code.spilled:
        found.append(f"{code.spilled} spills")
    x, y, z = (*launch.grid, 1, 1)[:3]
    if x >= 2**31 or max(y, z) > 65535 or min(x, y, z) < 1:
        found.append(f"grid {launch.grid}")
    if chip >= 90 and wants_wgmma(ttir) and not code.wgmma:
        found.append("no wgmma")
    if re.search(r"tt\.dot .*(inputPrecision = tf32|x(bf16|f16)> \*)", ttir) and not code.wgmma + code.mma:
        found.append("no mma")
    if chip >= 90:
        if "tt.descriptor_load" in ttir and not code.descriptor_loads:
            found.append("no TMA load")
        if plain_left_operands(ttir) and re.search(r"warp_group_dot %.* : tensor<", launch.kernel.asm["ttgir"]):
            found.append("left operand in registers")
        if in_flight(launch.kernel.asm["ttgir"]):
            found.append("register operand in flight")
        if serialized := re.search(r"\((C\d+)\).*wgmma.* serialized", launch.log):
            found.append(f"wgmma serialized ({serialized[1]})")
    return (*found, *overflows(launch))


def gate(chip: int, family: str, cases: Iterable[Case]) -> list[Row]:
    """Compile the cases for a chip; one row per kernel, and one per case that does not compile."""
    rows: dict[int, Row] = {}
    with compile_only(chip) as launches:
        for case, run in cases:
            launches.clear()
            try:
                run()
            except Exception as error:  # the compiler's own; the other cases are still wanted
                told = str(error).strip().splitlines() or [""]
                rows[hash(case)] = Row(family, case, chip, "", faults=(f"{type(error).__name__}: {told[0]}",))
            for launch in launches:
                wrong = faults(launch, chip)
                row = rows.get(id(launch.kernel))
                if row is not None:
                    row.launches += 1
                    row.faults += tuple(fault for fault in wrong if fault not in row.faults)
                    continue
                code = read_code(launch.kernel)
                rows[id(launch.kernel)] = Row(
                    family,
                    case,
                    chip,
                    launch.name.strip("_"),
                    1,
                    code.shared,
                    code.registers,
                    code.warps,
                    code.blocks(chip),
                    "wgmma" if code.wgmma else "mma" if code.mma else "",
                    code.descriptor_loads,
                    launch.seconds,
                    wrong,
                )
    return list(rows.values())


def _work(chip: int, name: str, quick: bool, part: str) -> list[Row]:
    return gate(chip, name, (case for case in FAMILIES[name](quick) if part in case[0]))


def table(rows: list[Row]) -> Table:
    result = Table(box=None, pad_edge=False)
    for heading in ("op", "first launch", "sm", "kernel", "times"):
        result.add_column(heading, justify="right" if heading in ("sm", "times") else "left", overflow="fold")
    for heading in ("shared", "regs", "warps", "blocks", "TMA"):
        result.add_column(heading, justify="right")
    for heading in ("matrix", "verdict"):
        result.add_column(heading, overflow="fold")
    for row in rows:
        verdict = f"[red]{'; '.join(row.faults)}[/red]" if row.faults else "ok"
        result.add_row(
            row.family,
            row.case,
            str(row.chip),
            row.kernel,
            str(row.launches),
            f"{row.shared:,}",
            str(row.registers),
            str(row.warps),
            str(row.blocks),
            str(row.loads),
            row.matrix,
            verdict,
        )
    return result


def summary(rows: list[Row], seconds: float) -> str:
    """The worst figures, in one line."""
    bad = sum(bool(row.faults) for row in rows)
    built = [row for row in rows if row.kernel]
    shared = ", ".join(
        f"{max((row.shared for row in built if row.chip == chip), default=0):,} B (sm_{chip})"
        for chip in sorted({row.chip for row in built})
    )
    return (
        f"{'FAIL' if bad else 'ok'}: {len(built)} kernels for {sum(row.launches for row in built)} launches, "
        f"{bad} with faults; worst: shared {shared}, {max((r.registers for r in built), default=0)} registers, "
        f"{min((r.blocks for r in built), default=0)} blocks per multiprocessor; "
        f"triton {triton.__version__}, {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few layers of each op")
    parser.add_argument("--only", help=f"ops, by comma: {', '.join(FAMILIES)}")
    parser.add_argument("--match", default="", help="only launches whose label has this part")
    parser.add_argument("--chip", type=int, choices=CHIPS, help="one chip only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--faults", action="store_true", help="list only kernels with faults")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process; unset it")
    names = options.only.split(",") if options.only else list(FAMILIES)
    chips = [options.chip] if options.chip else list(CHIPS)
    began = time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(_work, chip, name, options.quick, options.match) for name in names for chip in chips]
        rows = [row for done in waiting for row in done.result()]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table([row for row in rows if row.faults or not options.faults]))
    console.print(summary(rows, time.perf_counter() - began), soft_wrap=True)
    return 1 if any(row.faults for row in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

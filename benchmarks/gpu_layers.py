"""The convolutions measured by `gpu_ops.py`: those of ResNet-50 and ConvNeXt-T on a tile of 2048 x 2048 pixels."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 2048


@dataclass(frozen=True)
class Layer:
    """A convolution: `side` is that of its square input; `act` follows it, after an affine map."""

    cin: int
    cout: int
    kernel: int
    stride: int
    side: int
    groups: int = 1
    act: str = "relu"

    def __str__(self) -> str:
        kind = " depthwise" if self.groups > 1 else ""
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{step}{kind} {self.cin}>{self.cout} @{self.side}"

    @property
    def out(self) -> int:
        return self.side // self.stride

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.kernel % 2 else 0

    @property
    def flops(self) -> int:
        return 2 * self.out**2 * self.cout * self.cin // self.groups * self.kernel**2

    @property
    def bytes(self) -> int:
        """Input and output in bfloat16; of the input, only the part that a filter smaller than its stride reads."""
        read = min(1.0, self.kernel / self.stride) ** 2
        return int(2 * (self.side**2 * self.cin * read + self.out**2 * self.cout))


def resnet50(tile: int = TILE) -> list[Layer]:
    """Return every distinct convolution after the stem."""
    layers, inside = [], 64
    for stage, width in enumerate((64, 128, 256, 512)):
        side = tile // 4 // 2 ** max(0, stage - 1)
        stride = 2 if stage else 1
        layers += [
            Layer(inside, width, 1, 1, side),
            Layer(width, width, 3, stride, side),
            Layer(width, 4 * width, 1, 1, side // stride),
            Layer(inside, 4 * width, 1, stride, side, act="none"),
            Layer(4 * width, width, 1, 1, side // stride),
            Layer(width, width, 3, 1, side // stride),
        ]
        inside = 4 * width
    return list(dict.fromkeys(layers))


def convnext_tiny(tile: int = TILE) -> list[Layer]:
    """Return depthwise filters, the two products of a block, and downsampling."""
    layers = []
    for stage, width in enumerate((96, 192, 384, 768)):
        side = tile // 4 // 2**stage
        layers += [
            Layer(width, width, 7, 1, side, groups=width, act="none"),
            Layer(width, 4 * width, 1, 1, side, act="gelu"),
            Layer(4 * width, width, 1, 1, side, act="none"),
        ]
        if stage:
            layers.append(Layer(width // 2, width, 2, 2, 2 * side, act="none"))
    return layers


def config_layers(tile: int) -> list[Layer]:
    """Return the layers on which tiles of kernels are compared."""
    return [
        Layer(64, 64, 3, 1, tile // 4),
        Layer(128, 128, 3, 1, tile // 8),
        Layer(256, 256, 3, 1, tile // 16),
        Layer(256, 256, 3, 1, tile // 16 + 5),  # like the last tiles of an image: rows that do not fill a tile
        Layer(128, 128, 3, 2, tile // 4),
        Layer(64, 256, 1, 1, tile // 4),
        Layer(256, 64, 1, 1, tile // 4),
        Layer(1024, 256, 1, 1, tile // 16),
    ]

"""Zero-bias convolutional auto-encoders on the feature maps of a frozen network (Ahn et al., ISBI 2019).

One layer, on maps x (N, C, h, w), with * the convolution and *' its adjoint:

    z = W * x + b,   h = act(z),   code = pool(h),   r = out(V *' unpool(code) + c),   loss = mean (r - x)^2

    mode               act, training     act, encoding     biases b, c           out
    relu_bias          max(z, 0)         max(z, 0)         always                max(., 0)
    zero_bias_encode   max(z, 0)         max(z, 0)         in training only      max(., 0)
    trec               z where z > t     max(z, 0)         never                 identity
    tlin               z where z^2 > t   z                 never                 identity

TRec and TLin are those of Konda, Memisevic and Krueger (arXiv 1402.3337). Without biases and thresholds an encoder is
positively homogeneous: encode(k x) = k encode(x) for k > 0. A tied decoder has V = W: conv_transpose2d with the same
tensor is the adjoint of conv2d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import GigamorphError

MODES = ("relu_bias", "zero_bias_encode", "trec", "tlin")
FEATURES = ("code", "reconstruction")


class ConvAutoEncoder(nn.Module):
    """One auto-encoder: (N, channels, h, w) -> (N, code_channels, h // pool, w // pool) -> (N, channels, h, w).

    Args:
        channels: of the maps.
        code_channels: of the code.
        kernel: side of the filters, odd; maps are padded so that they keep their size.
        mode: one of `MODES`.
        theta: the threshold t of trec and tlin.
        tied: the decoder uses the encoder's weights; else it starts from them.
        pool: side and stride of the maximum pooling, 1 for none. Rows and columns that fill no block are omitted, and
            come back as zeros from the unpooling.
    """

    def __init__(
        self,
        channels: int,
        code_channels: int,
        kernel: int = 3,
        mode: str = "zero_bias_encode",
        theta: float = 1.0,
        tied: bool = False,
        pool: int = 2,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise GigamorphError(f"mode {mode!r} is unknown; take one of {', '.join(MODES)}")
        if kernel < 1 or kernel % 2 == 0 or pool < 1:
            raise GigamorphError(f"kernel {kernel} must be odd and pool {pool} at least 1")
        self.mode, self.theta, self.tied, self.pool = mode, theta, tied, pool
        self.weight = nn.Parameter(torch.empty(code_channels, channels, kernel, kernel))
        nn.init.xavier_normal_(self.weight)
        self.decoder_weight = None if tied else nn.Parameter(self.weight.detach().clone())
        biased = mode in ("relu_bias", "zero_bias_encode")
        self.bias = nn.Parameter(torch.zeros(code_channels)) if biased else None
        self.decoder_bias = nn.Parameter(torch.zeros(channels)) if biased else None

    def encode(self, x: Tensor, *, training: bool = False) -> tuple[Tensor, Tensor | None]:
        """The code, and the places of the maxima (None without pooling); in the form of training or of encoding."""
        z = F.conv2d(x, self.weight, self._bias(self.bias, training), padding=self.weight.shape[-1] // 2)
        if self.mode == "tlin":
            h = z * (z * z > self.theta) if training else z
        elif self.mode == "trec" and training:
            h = z * (z > self.theta)
        else:
            h = F.relu(z)
        if self.pool == 1:
            return h, None
        if min(x.shape[-2:]) < self.pool:
            raise GigamorphError(
                f"maps of {x.shape[-2]} x {x.shape[-1]} are smaller than the pooling of {self.pool}; take pool = 1, "
                "an earlier layer of the backbone or fewer auto-encoders"
            )
        return F.max_pool2d(h, self.pool, return_indices=True)

    def decode(self, code: Tensor, places: Tensor | None, size: Sequence[int], *, training: bool = False) -> Tensor:
        """The reconstruction (N, channels, *size) of a code."""
        if places is not None:
            # Rows and columns that fill no block make the size ambiguous.
            code = F.max_unpool2d(code, places, [self.pool] * 2, output_size=list(size))
        weight = self.weight if self.decoder_weight is None else self.decoder_weight
        r = F.conv_transpose2d(code, weight, self._bias(self.decoder_bias, training), padding=weight.shape[-1] // 2)
        return F.relu(r) if self.mode in ("relu_bias", "zero_bias_encode") else r

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction in the form of training."""
        code, places = self.encode(x, training=True)
        return self.decode(code, places, x.shape[-2:], training=True)

    def _bias(self, bias: Tensor | None, training: bool) -> Tensor | None:
        return bias if training or self.mode == "relu_bias" else None


class Stack(nn.Module):
    """Auto-encoders one on the other.

    Args:
        channels: of the maps.
        code_channels: of the code of each layer.
        feature: what a layer hands to the next, and the last one gives as the features: "reconstruction" (a layer
            reads and gives maps of `channels` channels) or "code".
        kernel, mode, theta, tied, pool: as for `ConvAutoEncoder`.
    """

    def __init__(
        self,
        channels: int,
        code_channels: Sequence[int],
        *,
        feature: str = "reconstruction",
        kernel: int = 3,
        mode: str = "zero_bias_encode",
        theta: float = 1.0,
        tied: bool = False,
        pool: int = 2,
    ) -> None:
        super().__init__()
        if feature not in FEATURES:
            raise GigamorphError(f"feature {feature!r} is unknown; take one of {', '.join(FEATURES)}")
        self.feature = feature
        inputs = [channels, *code_channels[:-1]] if feature == "code" else [channels] * len(code_channels)
        self.layers = nn.ModuleList(
            ConvAutoEncoder(before, code, kernel, mode, theta, tied, pool)
            for before, code in zip(inputs, code_channels, strict=True)
        )

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """The features of the first `depth` layers (all) in the form of encoding."""
        for layer in self._list(depth):
            size = x.shape[-2:]
            x, places = layer.encode(x)
            if self.feature == "reconstruction":
                x = layer.decode(x, places, size)
        return x

    def layer_loss(self, x: Tensor, index: int) -> Tensor:
        """Greedy: mean squared error of one layer on what the layers below hand to it; they get no gradient."""
        with torch.no_grad():
            below = self(x, index)
        return F.mse_loss(self.layers[index](below), below)

    def joint_loss(self, x: Tensor) -> Tensor:
        """Joint: mean squared error of the last reconstruction of x, through all layers."""
        if self.feature == "reconstruction":
            r = x
            for layer in self._list():
                r = layer(r)
            return F.mse_loss(r, x)
        code, trail = x, []
        for layer in self._list():
            size = code.shape[-2:]
            code, places = layer.encode(code, training=True)
            trail.append((layer, places, size))
        for layer, places, size in reversed(trail):
            code = layer.decode(code, places, size, training=True)
        return F.mse_loss(code, x)

    def _list(self, depth: int | None = None) -> list[ConvAutoEncoder]:
        return list(self.layers)[:depth]  # pyright: ignore[reportReturnType]

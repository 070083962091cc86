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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import GigamorphError

MODES = ("relu_bias", "zero_bias_encode", "trec", "tlin")
FEATURES = ("code", "reconstruction")


class ConvAutoEncoder(nn.Module):
    """One auto-encoder: (N, channels, h, w) -> (N, code_channels, h // pool, w // pool) -> (N, channels, h, w).

    Args:
        channels: of the input maps.
        code_channels: of the code.
        kernel: side of the filters, odd; padding keeps the size of maps.
        mode: one of `MODES`.
        theta: the threshold t of trec and tlin.
        tied: the decoder uses the encoder's weights; otherwise it starts from them.
        pool: side and stride of the maximum pooling, 1 for none. Rows and columns that do not fill a block are dropped,
            and unpooled as zeros.
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
            raise GigamorphError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
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
        """Return the code and the indices of the maxima (None without pooling), in training or encoding form."""
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
                f"maps of {x.shape[-2]} x {x.shape[-1]} are smaller than the pooling of {self.pool}; use pool = 1, "
                "an earlier layer of the backbone or fewer auto-encoders"
            )
        return F.max_pool2d(h, self.pool, return_indices=True)

    def decode(self, code: Tensor, indices: Tensor | None, size: Sequence[int], *, training: bool = False) -> Tensor:
        """The reconstruction (N, channels, *size) of a code."""
        if indices is not None:
            # Rows and columns that do not fill a block make the size ambiguous.
            code = F.max_unpool2d(code, indices, [self.pool] * 2, output_size=list(size))
        weight = self.weight if self.decoder_weight is None else self.decoder_weight
        r = F.conv_transpose2d(code, weight, self._bias(self.decoder_bias, training), padding=weight.shape[-1] // 2)
        return F.relu(r) if self.mode in ("relu_bias", "zero_bias_encode") else r

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction in the training form."""
        code, indices = self.encode(x, training=True)
        return self.decode(code, indices, x.shape[-2:], training=True)

    def _bias(self, bias: Tensor | None, training: bool) -> Tensor | None:
        return bias if training or self.mode == "relu_bias" else None


class Stack(nn.Module):
    """Stacked auto-encoders.

    Args:
        channels: of the input maps.
        code_channels: of each layer's code.
        feature: output of a layer for the next one, and of the stack: "reconstruction" (maps of `channels` channels) or
            "code".
        layer: kernel, mode, theta, tied, pool of `ConvAutoEncoder`.
    """

    def __init__(
        self,
        channels: int,
        code_channels: Sequence[int],
        *,
        feature: str = "reconstruction",
        **layer: Any,
    ) -> None:
        super().__init__()
        if feature not in FEATURES:
            raise GigamorphError(f"unknown feature {feature!r}; use one of {', '.join(FEATURES)}")
        self.feature = feature
        inputs = [channels, *code_channels[:-1]] if feature == "code" else [channels] * len(code_channels)
        self.layers = nn.ModuleList(
            ConvAutoEncoder(before, code, **layer) for before, code in zip(inputs, code_channels, strict=True)
        )

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Return the features of the first `depth` layers (all by default) in the encoding form."""
        for layer in self._list(depth):
            size = x.shape[-2:]
            x, indices = layer.encode(x)
            if self.feature == "reconstruction":
                x = layer.decode(x, indices, size)
        return x

    def layer_loss(self, x: Tensor, index: int) -> Tensor:
        """Greedy: mean squared error of one layer on the output of the layers below, which get no gradient."""
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
            code, indices = layer.encode(code, training=True)
            trail.append((layer, indices, size))
        for layer, indices, size in reversed(trail):
            code = layer.decode(code, indices, size, training=True)
        return F.mse_loss(code, x)

    def _list(self, depth: int | None = None) -> list[ConvAutoEncoder]:
        return list(self.layers)[:depth]  # pyright: ignore[reportReturnType]

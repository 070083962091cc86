"""Files of ImageNet weights that recipes know: their source, and the normalisation of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

_TORCHVISION = "https://download.pytorch.org/models/"
_META = "https://dl.fbaipublicfiles.com/"
_KERAS = "https://github.com/keras-team/keras-applications/releases/download/resnet/"
_CHOLLET = "https://github.com/fchollet/deep-learning-models/releases/download/"


@dataclass(frozen=True)
class Published:
    """A file of ImageNet weights.

    Attributes:
        source: where it can be downloaded.
        sha256: first digits of its hash, as published; empty if unknown.
        md5: published hashes of files with this name.
        mean, std: of its training images, with grey values from 0 to 1.
    """

    source: str
    sha256: str = ""
    md5: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def keras_weights(source: str, *md5: str) -> Published:
    """Describe Keras weights with Caffe's inputs: 0 to 255 minus the mean of each channel (red, green, blue here)."""
    return Published(source, md5=md5, mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255,) * 3)


def _keras_resnet(name: str, *md5: str) -> Published:
    return keras_weights(f"{_KERAS}{name} or, with the layers' old names, {_CHOLLET}v0.2/{name}", *md5)


_NOTOP = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_TOP = "resnet50_weights_tf_dim_ordering_tf_kernels.h5"
_VGG_NOTOP = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
_VGG_TOP = "vgg16_weights_tf_dim_ordering_tf_kernels.h5"

# torchvision's names end with the first digits of their SHA-256.
PUBLISHED: dict[str, Published] = {
    **{
        name: Published(_TORCHVISION + name, name.removesuffix(".pth").rpartition("-")[2])
        for name in (
            "alexnet-owt-7be5be79.pth",
            "densenet121-a639ec97.pth",
            "resnet18-f37072fd.pth",
            "resnet50-0676ba61.pth",
            "resnet50-11ad3fa6.pth",
            "vgg16-397923af.pth",
            "vgg16_bn-6c64b313.pth",
            "vgg19-dcbb9e9d.pth",
        )
    },
    "model_final_checkpoint_phase999.torch": Published(
        _META + "vissl/model_zoo/simclr_rn50_1000ep_simclr_8node_resnet_16_07_20.afe428c7/"
        "model_final_checkpoint_phase999.torch"
    ),
    "swav_800ep_pretrain.pth.tar": Published(_META + "deepcluster/swav_800ep_pretrain.pth.tar"),
    "dino_deitsmall8_pretrain.pth": Published(
        _META + "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", "230cd5"
    ),
    _NOTOP: _keras_resnet(_NOTOP, "4d473c1dd8becc155b73f8504c6f6626", "a268eb855778b3df3c7506639542a6af"),
    _TOP: _keras_resnet(_TOP, "2cb95161c43110f7111970584f804107", "a7b3fe01876f51b976af0dea6bc144eb"),
    _VGG_NOTOP: keras_weights(f"{_CHOLLET}v0.1/{_VGG_NOTOP}", "6d6bbae143d832006294945121d1f1fc"),
    _VGG_TOP: keras_weights(f"{_CHOLLET}v0.1/{_VGG_TOP}", "64373286793e3c8b2b4e3219cbf3544b"),
}

"""Makes Lightning importable if torchvision was built for another torch."""

from __future__ import annotations

import torch

_libraries: list[torch.library.Library] = []


def make_torchvision_importable() -> bool:
    """Define the operators without which ``import torchvision`` fails (and Lightning and timm with it).

    A CUDA build of torchvision on a CPU build of torch cannot load its library, and then fails with "operator
    torchvision::nms does not exist". Nothing in gigamorph calls these operators; declaring them is enough.

    Returns:
        True if the operators had to be declared.
    """
    if _libraries:
        return True
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except RuntimeError:
        try:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            return False  # another fault, which the code that needs torchvision reports
        _libraries.append(library)
        return True
    except ImportError:
        pass
    return False

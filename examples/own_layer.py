"""A layer of your own: made of PyTorch's ops it needs nothing from you, and its exactness can be seen.

The forward is recorded as it is. What has a rule is a window, an op per pixel, or a sum over the image; a layer whose
ops have none is refused with its name, and `accelerate(..., fallback="untiled")` takes it on whole maps.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gigamorph import accelerate


class EdgeGate(nn.Module):
    """Weighs each pixel by its own learned edge filter, and by how bright the image is as a whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(channels, 1, 3, 3) * 0.1)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        edges = conv2d(pad(x, (1, 1, 1, 1), mode="replicate"), self.filters, groups=x.shape[1])
        brightness = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.scale * edges - brightness)


def main() -> float:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    network = nn.Sequential(nn.Conv2d(1, 8, 3, 2), EdgeGate(8), nn.SiLU(), nn.Conv2d(8, 8, 3), *head).double()
    image = torch.randn(1, 1, 300, 220, dtype=torch.float64)
    gradients = []
    for net in (network, accelerate(network, tile=64)):
        network.zero_grad()
        net(image).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    difference = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())
    print(f"largest difference of the gradients from ordinary PyTorch, relative: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

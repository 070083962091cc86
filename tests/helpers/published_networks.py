"""A module of networks as a user has it, its networks, and their import."""

import torch

from gigamorph import create_model
from gigamorph.engine.published.importing import Wishes, import_network

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=2, in_channels=1, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, width, 3, 2), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Maps(Net):
    def forward(self, x):
        return self.conv(x), x.mean()

class Boxes(Net):
    # a detector that found one thing
    def forward(self, x):
        return [{"boxes": x.mean((1, 2, 3))[:, None].expand(1, 4), "scores": x.mean((1, 2, 3))}]

class Sure(Net):
    # its outputs are probabilities already, as its last step takes them
    def __init__(self, num_classes=2, in_channels=1, last="softmax"):
        super().__init__(num_classes, in_channels)
        self.last = last

    def forward(self, x):
        y = super().forward(x)
        if self.last == "heads":
            return {"a": y.softmax(1), "b": y[:, 0], "c": y.sigmoid()[:, 1:2].squeeze(1)}
        return y.sigmoid() if self.last == "sigmoid" else y.softmax(1).flatten(1)

class Double(Net):
    def __init__(self, num_classes=2, in_channels=1):
        super().__init__(num_classes, in_channels)
        self.double()

class Named(Net):
    # two outputs of names of their own
    def forward(self, x):
        y = super().forward(x)
        return {"cancer": y[:, :1], "density": y[:, 1:]}

class Tied(Net):
    # one tensor under two names, and a buffer of whole numbers
    def __init__(self, num_classes=2, in_channels=1):
        super().__init__(num_classes, in_channels)
        self.again = nn.Linear(4, num_classes)
        self.again.weight = self.fc.weight
        self.register_buffer("order", torch.arange(4))

    def forward(self, x):
        return self.again(self.norm(self.conv(x))[:, self.order].relu().mean((2, 3)))

class Random(Net):
    def forward(self, x):
        return super().forward(x) * torch.rand(())

class Heads(Net):
    # num_classes is of the head that is not the last one
    def __init__(self, num_classes=2, in_channels=1):
        super().__init__(num_classes, in_channels)
        self.cancer = nn.Linear(4, 1)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        z = y.mean((2, 3))
        return {"heads": (self.fc(z), self.cancer(z)[:, 0]), "map": y, "loss": None}
"""
SIZE = (72, 68)


def network(width=4, classes=3, channels=1, seed=0):
    torch.manual_seed(seed)
    made = create_model(f"published_nets:Net?width={width}", classes, channels).eval()
    made.norm.running_mean.normal_(0, 0.1)
    made.norm.running_var.uniform_(0.5, 2)
    return made


def imported(here, name="net", source="published_nets:Net", quiet=None, **wishes):
    wishes = {"weights": str(here / "w.pt"), "size": SIZE} | wishes
    said = [] if quiet is None else quiet
    import_network(source, here / name, Wishes(**wishes), said.append)
    return here / name

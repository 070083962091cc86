"""Networks that need no extra package, and one function that builds any network."""

from .lesionnet import LesionNet
from .registry import MODELS, create_model, load_weights
from .resnet import ResNet, resnet18, resnet34, resnet50

__all__ = ["MODELS", "LesionNet", "ResNet", "create_model", "load_weights", "resnet18", "resnet34", "resnet50"]

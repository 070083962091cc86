"""Networks that need no extra package, and the functions that build any network by name."""

from .lesionnet import LesionNet
from .registry import MODELS, build_model, create_model, load_weights
from .resnet import ResNet, resnet18, resnet34, resnet50

__all__ = ["MODELS", "LesionNet", "ResNet", "build_model", "create_model", "load_weights"]
__all__ += ["resnet18", "resnet34", "resnet50"]

"""Explains predictions by exact maps at native resolution, in the coordinates of the file."""

from .maps import Explanation, activation_map, gradient_map
from .marks import Mark, find_marks
from .write import Options, explain

__all__ = ["Explanation", "Mark", "Options", "activation_map", "explain", "find_marks", "gradient_map"]

"""Explains predictions by exact maps at native resolution, in the coordinates of the file."""

from .maps import Explanation, Mark, activation_map, find_marks, gradient_map
from .write import Options, explain

__all__ = ["Explanation", "Mark", "Options", "activation_map", "explain", "find_marks", "gradient_map"]

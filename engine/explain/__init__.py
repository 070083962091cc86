"""Explains predictions by exact maps at native resolution, in the coordinates of the file."""

from .maps import Explanation, Mark, activation_map, find_marks, gradient_map
from .write import ExplainOptions, explain

__all__ = ["ExplainOptions", "Explanation", "Mark", "activation_map", "explain", "find_marks", "gradient_map"]

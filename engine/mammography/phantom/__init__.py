"""Phantom mammograms of any size: a task that is easy at native resolution and impossible at low resolution.

The label of the standard phantoms is 1 with a cluster of micro-calcifications. An image without one has the same
cluster blurred, so that averaging over 8 x 8 pixels removes the difference; masses and lines are in both classes.
"""

from .exams import write_phantoms
from .image import LESIONS, Lesion, PhantomImage

__all__ = ["LESIONS", "Lesion", "PhantomImage", "write_phantoms"]

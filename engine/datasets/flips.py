"""The names of mirror images, for whoever asks for them."""

FLIPS = {"left-right": (True, False), "up-down": (False, True), "both": (True, True)}
"""(left-right, up-down) of the mirror images that are drawn in training, or averaged over in predictions."""

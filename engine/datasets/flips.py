"""The names of mirror images."""

FLIPS = {"left-right": (True, False), "up-down": (False, True), "both": (True, True)}
"""(left-right, up-down) of the mirror images that training draws and predictions average over."""

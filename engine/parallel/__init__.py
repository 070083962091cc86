"""Launches the processes that train together or share an image, and sets up their process group."""

"""Layouts of published checkpoints, one file each: how to recognise them, and the networks in them."""

"""Processes that work on one batch."""

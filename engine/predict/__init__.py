"""Prediction over archives of any size. A killed run neither loses nor duplicates results."""

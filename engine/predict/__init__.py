"""Prediction over archives: from a table of any length to predictions that a kill at any moment neither loses nor
doubles."""

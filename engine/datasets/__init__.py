"""Data sets: tables, public data sets, checks, splits, masks, augmentation, conversion and phantoms."""

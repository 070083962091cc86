"""Data sets: tables, checks, splits, masks, augmentation and conversion."""

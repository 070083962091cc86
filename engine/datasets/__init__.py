"""Tables of public data sets, checks, splits, augmentation, conversion, phantoms."""

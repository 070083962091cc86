"""Public data sets, read from the files as downloaded, one file each."""

from .public import DATA_SETS, detect, read_data_set

__all__ = ["DATA_SETS", "detect", "read_data_set"]

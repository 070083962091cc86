"""Tables of images, as records of one schema: csv files and folders per class."""

from .generic import columns_named, label_columns, missing_files, missing_masks, read_table, without_masks
from .schema import READING, SPLITS, Box, Finding, Record, Table, reading_of, write_table

__all__ = ["READING", "SPLITS", "Box", "Finding", "Record", "Table", "columns_named", "label_columns", "missing_files"]
__all__ += ["missing_masks", "read_table", "reading_of", "without_masks", "write_table"]

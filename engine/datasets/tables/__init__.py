"""Tables of images, as records of one schema: csv files, folders per class, and tables of public data sets."""

from .generic import label_columns, missing_files, missing_masks, read_table, without_masks
from .public import DATA_SETS, detect, read_data_set
from .schema import READING, SPLITS, Box, Finding, Record, Table, reading_of, write_table

__all__ = [
    "DATA_SETS",
    "READING",
    "SPLITS",
    "Box",
    "Finding",
    "Record",
    "Table",
    "detect",
    "label_columns",
    "missing_files",
    "missing_masks",
    "read_data_set",
    "read_table",
    "reading_of",
    "without_masks",
    "write_table",
]

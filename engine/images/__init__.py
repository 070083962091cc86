"""Pixel sources and file formats: DICOM, TIFF, zarr, PNG and npy, their grey scale, orientation and geometry."""

"""Function-preserving growth: wider, deeper, larger kernels, a front for larger images; the same function."""

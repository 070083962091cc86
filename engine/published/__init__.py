"""Networks that others have published: import, check, prediction and export."""

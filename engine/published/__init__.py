"""Networks that others have published: imported, checked, predicted with, and exported again."""

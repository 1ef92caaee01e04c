"""``clipfast collection merge``."""

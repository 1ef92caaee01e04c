"""``clipfast segment``."""

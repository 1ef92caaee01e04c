"""``clipfast collect``."""

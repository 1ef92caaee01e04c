"""``clipfast scenes``."""

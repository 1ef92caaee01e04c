"""``clipfast reproduce``."""

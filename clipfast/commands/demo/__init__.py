"""``clipfast demo``."""

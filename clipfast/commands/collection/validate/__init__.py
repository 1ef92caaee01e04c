"""``clipfast collection validate``."""

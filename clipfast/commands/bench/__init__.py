"""``clipfast bench``."""

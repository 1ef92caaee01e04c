"""``clipfast collection retry``."""

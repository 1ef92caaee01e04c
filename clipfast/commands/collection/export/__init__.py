"""``clipfast collection export``."""

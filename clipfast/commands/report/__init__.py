"""``clipfast report``."""

"""``clipfast models``."""

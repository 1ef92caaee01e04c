"""``clipfast ablate``."""

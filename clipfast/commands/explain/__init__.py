"""``clipfast explain``."""

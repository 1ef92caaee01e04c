"""``clipfast plan``."""

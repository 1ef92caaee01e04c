"""``clipfast decompose``."""

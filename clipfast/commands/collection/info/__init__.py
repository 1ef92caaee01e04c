"""``clipfast collection info``."""

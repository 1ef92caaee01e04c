"""``clipfast textspan``."""

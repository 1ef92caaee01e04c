"""``clipfast doctor``."""

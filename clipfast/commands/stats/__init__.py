"""``clipfast stats``."""

"""``clipfast retrieve``."""

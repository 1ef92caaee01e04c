"""``clipfast collection``: commands on a collection as a whole, a folder each."""

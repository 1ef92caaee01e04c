"""Engines: who computes the units of a pass. The records of the collection are the only truth for each of them."""

"""Data sets: images in files, folders and tar shards, their labels, and what is collected from them."""

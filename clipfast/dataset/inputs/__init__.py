"""Inputs of a pass: folders, tar shards, tables, lists and data sets in memory, each a reader of units."""

"""Modules with the names and results of other packages, so that scripts written for those run on clipfast.

Each is imported by its own name; this package imports none of them.
"""

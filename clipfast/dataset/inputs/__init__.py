"""Inputs of a pass: folders, tar shards, tables, lists and data sets in memory, each a reader of units.

:func:`clipfast.dataset.inputs.opening.open_inputs` opens what has a name, and
:func:`clipfast.dataset.inputs.objects.from_object` data sets of Python. An input can be pickled. It divides itself into
units, reads a unit (:class:`clipfast.dataset.inputs.reading.Reading`), and gives the names of a unit's images without
the images. What is read of a unit depends on the unit alone.
"""

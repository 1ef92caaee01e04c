"""Public data sets in the layout that their owners publish them in: images with labels, groups, attributes and masks.

Readers only: nothing is downloaded. A label is looked up by an image's name in the data set's own files, never by its
position. A folder that is laid out otherwise raises one line with what was expected and what was found.
"""

"""What :class:`clipfast.Contributions` looks like elsewhere: as labelled arrays, as a table, as a picture, as HTML.

Imported when one of its methods is called: it draws with :mod:`clipfast.report`, which builds on contributions.
"""

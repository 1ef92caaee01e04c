"""The labels that a command's options ask for."""

from collections.abc import Sequence

from clipfast.commands import console
from clipfast.commands.options import InputOptions
from clipfast.dataset.collection import Entry, labelled
from clipfast.dataset.files import Source
from clipfast.dataset.labels import Labels, parse_where, read_labels


def labels_of(options: InputOptions, sources: Sequence[Source]) -> Labels | None:
    """The labels of images; None where none are asked for. Warns about what does not fit.

    Raises:
        InputError: no images, a column without ``--labels``, or labels that cannot be read.
    """
    options.check()
    if options.labels is None:
        return None
    labels = read_labels(
        sources,
        options.labels,
        label=options.label_column,
        group=options.group_columns(),
        file_column=options.file_column,
        where=parse_where(options.where),
    )
    for note in labels.notes:
        console.warn(note)
    return labels


def labelled_images(options: InputOptions, sources: Sequence[Source]) -> list[tuple[Source, Entry]]:
    """The images that ``--where`` keeps, with their labels and groups.

    Raises:
        InputError: as :func:`labels_of`.
    """
    entries = [Entry.of(source) for source in sources]
    labels = labels_of(options, sources)
    if labels is None:
        return list(zip(sources, entries, strict=True))
    selected = labels.selected or (True,) * len(sources)
    kept = zip(sources, labelled(entries, labels), selected, strict=True)
    return [(source, entry) for source, entry, keep in kept if keep]

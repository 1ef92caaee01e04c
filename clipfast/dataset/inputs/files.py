"""Image files: the ones that a user names or a glob finds, on this machine or at a URL, and reading ranges of them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice

from clipfast.dataset.inputs.locations import REMOTE_THREADS, Naming, fetch, is_url
from clipfast.dataset.inputs.reading import Reading, Samples
from clipfast.dataset.plan import Unit
from clipfast.dataset.samples import Failure, Sample
from clipfast.errors import ImageError


@dataclass(frozen=True)
class FileInput:
    """Image files, in units of a range each.

    Attributes:
        name: what the user called them.
        files: their absolute paths and URLs, in order.
        naming: gives the files the names that the user gives them.
    """

    name: str
    files: tuple[str, ...]
    naming: Naming = field(default_factory=Naming)

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` files."""
        return file_units(self.files, size)

    def read(self, unit: Unit) -> Reading:
        """A sample for each file: the path of a local one, the bytes of a remote one."""
        return read_files(unit, self.naming)

    def names(self, unit: Unit) -> Reading:
        """The same samples without bytes."""
        return read_files(unit, self.naming, content=False)


def file_units(files: Iterable[str], size: int, folder: str | None = None) -> Iterator[Unit]:
    """Ranges of at most ``size`` files; ``folder`` is the one that was searched."""
    start, left = 0, iter(files)
    while names := tuple(islice(left, size)):
        yield Unit("files", folder or "", start, start + len(names), folder=folder, files=names)
        start += len(names)


def read_files(unit: Unit, naming: Naming, *, content: bool = True) -> Reading:
    """A sample for each file of a unit.

    Args:
        unit: a range of files.
        naming: gives the files their ids.
        content: whether remote ones are fetched.
    """

    def samples(_: Reading) -> Samples:
        named = (located(naming.name(path), path, unit.folder) for path in unit.files)
        yield from fetched(named) if content else named

    return Reading(samples)


def located(name: str, path: str, folder: str | None = None) -> Sample:
    """The sample of an image file: with size and time where it is a local one that is there."""
    size = modified = None
    if not is_url(path):
        try:
            status = os.stat(path)
            size, modified = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            pass  # opening it gives the reason
    return Sample(name, path, folder=folder, size=size, modified_ns=modified)


def fetched(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples, those of images at URLs with their bytes, which several threads fetch ahead; in order."""
    waiting: deque[Future[Sample]] = deque()
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        for sample in samples:
            if is_url(sample.path) and not sample.member and sample.failure is None:
                if pool is None:
                    pool = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="clipfast-fetching")
                    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                waiting.append(pool.submit(_fetched, sample))
            elif waiting:
                done: Future[Sample] = Future()
                done.set_result(sample)
                waiting.append(done)
            else:
                yield sample
            if len(waiting) == 2 * REMOTE_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fetched(sample: Sample) -> Sample:
    try:
        data = fetch(sample.path)
    except ImageError as error:
        return sample.failed(Failure.of(error))
    return replace(sample, content=data, size=len(data))

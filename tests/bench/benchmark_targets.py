"""The calls whose memory :mod:`test_bench_measuring` measures in new processes."""

from collections.abc import Callable


def allocating(megabytes: int) -> Callable[[], object]:
    return lambda: len(bytearray(b"x") * (megabytes * 1_000_000)) * 0


def heavy_to_build(megabytes: int) -> Callable[[], object]:
    len(bytearray(b"x") * (megabytes * 1_000_000))
    return lambda: None


def failing() -> Callable[[], object]:
    def call() -> object:
        raise RuntimeError("no such image")

    return call

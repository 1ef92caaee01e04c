"""The Python of a GPU's path without a GPU: every choice and every launch is made, and none is run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clipfast.kernels import dispatch, launch
from clipfast.kernels.launch import Launch


def _ignore(launch: Launch) -> None:
    """A launch that is not run."""


@contextmanager
def triton_everywhere(capability: int = 90, launcher: Callable[[Launch], object] = _ignore) -> Iterator[None]:
    """A context in which ``"auto"`` takes Triton's kernels for tensors anywhere, and launches go to ``launcher``.

    Args:
        capability: compute capability of the GPU that tensors count as being on, 80, 90 or 100.
        launcher: gets every launch; results of operations are memory that nobody wrote.
    """
    before = dispatch.BACKENDS
    dispatch.BACKENDS = (dispatch.Backend("triton"), dispatch.EAGER)
    try:
        with launch.instead(launcher), launch.assume(capability):
            yield
    finally:
        dispatch.BACKENDS = before
        dispatch.forget()

"""Errors a user can mend: each is one line that says what is wrong, where, and what to do.

The command line prints them without a traceback and exits with 2. Anything else that is raised is a fault of clipfast.
"""


class ClipfastError(Exception):
    """Base of every error that the caller can mend."""


class InputError(ClipfastError, ValueError):
    """An argument does not fit: a shape, a name, a range."""


class ImageError(ClipfastError):
    """A file that is not a readable image.

    Attributes:
        status: the kind of failure, a value of :class:`clipfast.dataset.samples.Status`: ``"missing"``,
            ``"unreadable"``, ``"no_image"``, ``"decode_error"``, ``"too_large"`` or ``"out_of_memory"``.
    """

    def __init__(self, message: str, status: str = "decode_error") -> None:
        super().__init__(message)
        self.status = status


class ModelError(ClipfastError):
    """A model that cannot be found or loaded."""


class UnsupportedTower(ModelError):
    """A vision tower whose decomposition is not exact or not implemented.

    Attributes:
        reasons: every reason, not only the first.
    """

    def __init__(self, name: str, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"cannot decompose {name}: {'; '.join(reasons)}")


class NotKept(ClipfastError, AttributeError):
    """A result that was not asked for when the images were decomposed."""


class MissingExtra(ClipfastError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'clipfast[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = ("can't allocate memory", "not enough memory", "cuda error: out of memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)

"""Errors on their way from a worker to the driver."""

import traceback
from dataclasses import dataclass
from typing import Any, Self

from clipfast.errors import ClipfastError


class WorkerError(RuntimeError):
    """A fault in a worker; the message has its traceback."""


@dataclass(frozen=True)
class Raised:
    """An error that a worker raised, as what can be pickled whatever the error's own arguments are.

    Attributes:
        kind: its class, or :class:`WorkerError` for one that the user cannot mend.
        arguments: of its base class.
    """

    kind: type[BaseException]
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """What an error becomes."""
        if isinstance(error, ClipfastError):
            return cls(type(error), (str(error),))
        if isinstance(error, OSError):
            if error.errno is None:
                return cls(OSError, (str(error),))
            return cls(OSError, (error.errno, error.strerror, error.filename))
        return cls(WorkerError, ("a worker failed:\n" + "".join(traceback.format_exception(error)).rstrip(),))

    def error(self) -> BaseException:
        """The error again."""
        if not issubclass(self.kind, ClipfastError):
            return self.kind(*self.arguments)
        # Some of these classes make their message of other arguments; the message is there already.
        error = self.kind.__new__(self.kind, *self.arguments)
        error.args = self.arguments
        return error

"""An iterator that a thread fills ahead of those who take from it, within bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item], Generic[Item]):
    """The items of another iterator, in order. A thread takes them from it; several threads may take them from here.

    Args:
        items: taken and closed in the thread.
        most: items that wait at a time.
        size: bytes of memory that an item holds, about.
        most_bytes: bytes that wait at a time; a larger item waits alone.
        together: items that are handed over at once: waking a thread takes longer than making a small item.
        name: of the thread.
    """

    def __init__(
        self,
        items: Iterator[Item],
        most: int,
        *,
        size: Callable[[Item], int] = lambda _: 0,
        most_bytes: int = 0,
        together: int = 1,
        name: str = "ahead",
    ) -> None:
        self._items, self._size = items, size
        self._most, self._most_bytes, self._together = most, most_bytes, together
        self._changed = threading.Condition()
        self._waiting: deque[tuple[list[Item], int]] = deque()
        self._current: deque[Item] = deque()
        self._bytes = self._count = 0
        self._done = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"clipfast-{name}", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        """The next item; waits until it is there. What the iterator raised is raised after the items before it."""
        with self._changed:
            while not self._current:
                self._changed.wait_for(lambda: self._waiting or self._done or self._closed)
                if self._closed or not self._waiting:
                    if self._error is not None and not self._closed:
                        raise self._error
                    raise StopIteration
                items, size = self._waiting.popleft()
                self._bytes -= size
                self._count -= len(items)
                self._current.extend(items)
                self._changed.notify_all()
            return self._current.popleft()

    def close(self) -> None:
        """Stops the thread and waits for it; whoever waits for an item gets none."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._current.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        together: list[Item] = []
        size = 0
        try:
            for item in self._items:
                together.append(item)
                size += self._size(item)
                if len(together) == self._together or size > self._most_bytes // 8:
                    items, together = together, []
                    if not self._hand_over(items, size):
                        return
                    size = 0
        except BaseException as error:
            self._error = error
        finally:
            with suppress(Exception):
                self._items.close()  # type: ignore[attr-defined]
            if together:
                self._hand_over(together, size)
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _hand_over(self, items: list[Item], size: int) -> bool:
        """Whether the items are wanted; waits until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._has_room(len(items), size))
            if self._closed:
                return False
            self._waiting.append((items, size))
            self._bytes += size
            self._count += len(items)
            self._changed.notify_all()
        return True

    def _has_room(self, count: int, size: int) -> bool:
        return self._bytes + size <= self._most_bytes and self._count + count <= self._most

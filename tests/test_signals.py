"""Handlers that raise where threads take and release locks: no lock is left behind, and waits still end."""

import functools
import os
import queue
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clipfast import reading
from clipfast.images import MemoryBudget
from clipfast.signals import BetweenLocks, interrupts_between_locks

LATE = 0.05  # seconds


class Reached(Exception):
    """What the handler raises."""


def _raise(number: int, frame: object) -> None:
    raise Reached


@pytest.fixture
def handled() -> Iterator[None]:
    """SIGUSR1 raises between locks."""
    before = signal.signal(signal.SIGUSR1, BetweenLocks(_raise))
    yield
    signal.signal(signal.SIGUSR1, before)


class Lock:
    """A lock with a signal right after it was taken, in C, as a real one is.

    Attributes:
        released: how often it was.
    """

    def __init__(self) -> None:
        lock = threading.Lock()
        self.released = 0
        self.acquire, self.release = lock.acquire, lock.release
        self.__enter__: Callable[..., Any] = functools.partial(os.kill, os.getpid(), signal.SIGUSR1)
        self.__exit__: Callable[..., Any] = self._released

    def _released(self, *_: object) -> None:
        self.released += 1


def test_without_it_a_lock_is_left_behind() -> None:
    """Else the next test would show nothing."""
    lock, before = Lock(), signal.signal(signal.SIGUSR1, _raise)
    try:
        with pytest.raises(Reached), threading.Condition(lock):  # type: ignore[arg-type]
            pytest.fail("the block was entered")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert lock.released == 0


def test_a_lock_that_is_taken_is_released(handled: None) -> None:
    lock, entered = Lock(), False
    with pytest.raises(Reached), threading.Condition(lock):  # type: ignore[arg-type]  # noqa: PT012
        entered = True
        time.sleep(10)
    assert entered
    assert lock.released == 1


def test_a_queue_gets_its_item_and_tells_who_waits(handled: None) -> None:
    items: queue.Queue[int] = queue.Queue()
    notify = items.not_empty.notify
    items.not_empty.notify = lambda: (os.kill(os.getpid(), signal.SIGUSR1), notify())[1]  # type: ignore[method-assign]
    with pytest.raises(Reached):  # noqa: PT012
        items.put(3)
        time.sleep(10)
    assert items.get(timeout=10) == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda: threading.Event().wait(),
        lambda: threading.Event().wait(30),
        lambda: queue.Queue().get(),
        lambda: threading.Semaphore(0).acquire(),
    ],
    ids=["event", "event with a limit", "queue", "semaphore"],
)
def test_a_wait_is_interrupted(wait: Callable[[], object], handled: None) -> None:
    _send_later()
    started = time.monotonic()
    with pytest.raises(Reached):
        wait()
    assert time.monotonic() - started < 20


def test_waiting_for_a_thread_is_interrupted(handled: None) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    _send_later()
    with pytest.raises(Reached):
        thread.join()
    end.set()
    thread.join(10)
    assert not thread.is_alive()


def test_one_signal_calls_the_handler_once() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, BetweenLocks(lambda number, _: calls.append(number)))
    try:
        for _ in range(20):
            with threading.Condition(Lock()):  # type: ignore[arg-type]
                pass
            time.sleep(LATE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == [signal.SIGUSR1] * 20


def test_no_thread_waits_for_ever() -> None:
    """With the handler alone, about half of these threads do."""
    before = signal.getsignal(signal.SIGUSR1)
    rng = random.Random(0)
    try:
        for _ in range(60):
            changed, closed = threading.Condition(), threading.Event()
            thread = threading.Thread(target=_wait_until, args=(changed, closed), daemon=True)
            thread.start()
            signal.signal(signal.SIGUSR1, BetweenLocks(_raise))
            with pytest.raises(Reached):  # noqa: PT012
                _send_later(rng.uniform(0.0005, 0.003))
                while True:
                    with changed:
                        pass
            with changed:
                closed.set()
                changed.notify_all()
            thread.join(10)
            assert not thread.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, before)


BUDGET = MemoryBudget(100)


def _take_no_memory() -> None:
    with BUDGET.scope():
        BUDGET.take(0)


@pytest.mark.parametrize("use", [reading._Cores().notify, _take_no_memory], ids=["cores", "memory"])
def test_a_script_without_handlers_of_its_own_leaves_no_lock(use: Callable[[], object]) -> None:
    """Ctrl-C in a loop over ``model.batches`` raises wherever the main thread is."""
    before = signal.signal(signal.SIGUSR1, _raise)
    rng = random.Random(0)
    try:
        for _ in range(60):
            with pytest.raises(Reached):  # noqa: PT012
                _send_later(rng.uniform(0.0005, 0.003))
                while True:
                    use()
            other = threading.Thread(target=use, daemon=True)
            other.start()
            other.join(10)
            assert not other.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, before)


def _wait_until(changed: threading.Condition, closed: threading.Event) -> None:
    with changed:
        changed.wait_for(closed.is_set)


class Final:
    """Sends itself a signal when it is deleted."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)


def _finalized() -> None:
    weakref.finalize(threading.Lock(), os.kill, os.getpid(), signal.SIGUSR1)


def _with_a_callback() -> None:
    thing = threading.Lock()
    _KEPT.append(weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGUSR1)))


_KEPT: list[object] = []


@pytest.mark.parametrize("finalize", [Final, _finalized, _with_a_callback])
def test_what_a_finalizer_swallows_is_raised_again(handled: None, finalize: Callable[[], object]) -> None:
    for _ in range(3):
        with pytest.raises(Reached):  # noqa: PT012
            finalize()
            time.sleep(10)


def test_other_exceptions_in_finalizers_are_reported(handled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def __del__(self) -> None:
            raise ValueError("reported")

    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))
    with pytest.raises(Reached):
        os.kill(os.getpid(), signal.SIGUSR1)
    Fails()
    assert [str(each) for each in reported] == ["reported"]


def test_elsewhere_it_raises_at_once(handled: None) -> None:
    with pytest.raises(Reached):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_ctrl_c_in_a_block_and_after_it() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with interrupts_between_locks():
            inner = signal.getsignal(signal.SIGINT)
            assert isinstance(inner, BetweenLocks)
            with interrupts_between_locks():
                assert signal.getsignal(signal.SIGINT) is inner
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def body() -> None:
        with interrupts_between_locks():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def _send_later(seconds: float = LATE) -> None:
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGUSR1)).start()

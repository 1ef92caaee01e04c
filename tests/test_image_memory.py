"""How much memory reading images takes: shared between threads, bounded per image, and no reason to end a pass."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from platform import libc_ver

import numpy as np
import pytest
from PIL import Image

from clipfast import images
from clipfast.errors import ImageError
from clipfast.images import MemoryBudget, as_rgb, open_image, with_memory

SECONDS = 20.0
MEGABYTES = 1 << 20


def run_all(*targets: object) -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread waits for ever"


# ------------------------------------------------------------------------------------------------------------- budget


def test_threads_together_hold_no_more_than_the_budget() -> None:
    budget, lock = MemoryBudget(10), threading.Lock()
    held, most = 0, 0

    def read() -> None:
        nonlocal held, most
        for _ in range(20):
            with budget.scope():
                budget.take(4)
                with lock:
                    held += 4
                    most = max(most, held)
                time.sleep(0.0005)
                with lock:
                    held -= 4

    run_all(*[read] * 6)
    assert most == 8


def test_an_image_larger_than_the_budget_is_read_alone() -> None:
    budget = MemoryBudget(10)
    order: list[str] = []
    first = threading.Event()

    def small() -> None:
        with budget.scope():
            budget.take(1)
            first.set()
            time.sleep(0.05)
            order.append("small")

    def large() -> None:
        first.wait(SECONDS)
        with budget.scope():
            budget.take(1000)
            order.append("large")

    run_all(small, large)
    assert order == ["small", "large"]


def test_a_large_image_is_not_starved_by_small_ones() -> None:
    budget, done = MemoryBudget(10), threading.Event()

    def small() -> None:
        while not done.is_set():
            with budget.scope():
                budget.take(4)
                time.sleep(0.002)

    def large() -> None:
        time.sleep(0.02)
        with budget.scope():
            budget.take(10)
        done.set()

    run_all(small, small, small, large)


def test_threads_that_hold_memory_do_not_wait_for_each_other() -> None:
    budget, both = MemoryBudget(10), threading.Barrier(2)

    def nested() -> None:
        with budget.scope():
            budget.take(5)
            both.wait(SECONDS)
            with budget.scope():
                budget.take(5)

    run_all(nested, nested)
    run_all(lambda: _take_all(budget))


def _take_all(budget: MemoryBudget) -> None:
    with budget.scope(alone=True):
        pass


def test_memory_is_returned_after_an_error() -> None:
    budget = MemoryBudget(10)

    def fail() -> None:
        with budget.scope():
            budget.take(10)
            raise ValueError

    for _ in range(3):
        with pytest.raises(ValueError):
            fail()
    run_all(lambda: _take_all(budget))


def test_opened_images_are_counted_until_the_end_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    budget = MemoryBudget(1 << 30)
    take = budget.take
    monkeypatch.setattr(images, "_MEMORY", budget)
    monkeypatch.setattr(budget, "take", lambda amount: (taken.append(amount), take(amount)))
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    Image.new("I;16", (100, 50)).save(tmp_path / "b.png")
    open_image(tmp_path / "a.png")
    open_image(tmp_path / "b.png")
    assert taken == [100 * 50 * 4, 100 * 50 * 6]


# ------------------------------------------------------------------------------------------------------ out of memory


def test_an_image_that_runs_out_of_memory_is_read_again_alone() -> None:
    attempts: list[int] = []

    def read() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise MemoryError
        return "read"

    assert with_memory(read, "a.png") == "read"
    assert len(attempts) == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_for_one_image_names_it(error: Exception) -> None:
    def read() -> None:
        raise error

    with pytest.raises(ImageError, match=r"^a\\nb\.png: not enough memory to read it$"):
        with_memory(read, "a\nb.png")


def test_other_errors_are_not_tried_again() -> None:
    attempts: list[int] = []

    def read() -> None:
        attempts.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        with_memory(read, "a.png")
    assert len(attempts) == 1


LIMITED = """
import resource, sys
from clipfast.reading import prepared
from open_clip.transform import PreprocessCfg, image_transform_v2
folder = sys.argv[1]
transform = image_transform_v2(PreprocessCfg(), is_train=False)
list(prepared(transform, [f"{folder}/0.png"], 1))  # what is allocated once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
batches = prepared(transform, [f"{folder}/{n}.png" for n in range(5)], 2, on_error="skip")
print([len(batch) for batch in batches], [(each.index, str(each.error)) for each in batches.skipped])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
@pytest.mark.slow
def test_one_image_without_enough_memory_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("1", (10_000, 10_000) if number == 2 else (30, 30)).save(tmp_path / f"{number}.png")
    environment = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "2", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    reason = f"{tmp_path}/2.png: not enough memory to read it"
    assert done.stdout.strip() == f"[2, 1, 1] {[(2, reason)]!r}"


PEAK = """
import resource, sys
from clipfast.images import open_image
from concurrent.futures import ThreadPoolExecutor
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
open_image(sys.argv[2])
before = peak()
with ThreadPoolExecutor(3) as pool:
    print(*set(pool.map(lambda _: open_image(sys.argv[1]).size, range(3))))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux gives it")
@pytest.mark.parametrize(("mode", "bytes_each"), [("I;16", 6), ("RGBA", 8), ("LA", 8)])
@pytest.mark.slow
def test_converting_large_images_makes_no_wider_copies(tmp_path: Path, mode: str, bytes_each: int) -> None:
    """Three threads read 25 megapixels each: decoded and RGB, and 60 MiB for strips and Pillow's own."""
    path, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.new(mode, (5000, 5000)).save(path, compress_level=1)
    Image.new(mode, (5, 5)).save(small)
    command = [sys.executable, "-c", PEAK, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    size, peak = done.stdout.splitlines()
    assert size == "(5000, 5000)"
    assert int(peak) <= 3 * 25e6 * bytes_each / MEGABYTES + 60


RETURNED = """
import resource, sys
from clipfast.images import open_image, with_memory
from concurrent.futures import ThreadPoolExecutor
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
with_memory(lambda: open_image(sys.argv[2]).size, "")
before = used()
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda _: with_memory(lambda: open_image(sys.argv[1]).size, ""), range(6)))
    print(used() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_reading_threads_keep_no_freed_memory_of_large_images(tmp_path: Path) -> None:
    path, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.new("RGBA", (5000, 5000)).save(path, compress_level=1)
    Image.new("RGBA", (5, 5)).save(small)
    command = [sys.executable, "-c", RETURNED, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) <= 60


# ------------------------------------------------------------------------------------------------------------- strips


def pixels(mode: str, rng: np.random.Generator) -> Image.Image:
    if mode in ("I;16", "I;16B"):
        image = Image.fromarray(rng.integers(0, 65536, (37, 23), dtype=np.uint16))
        return image if mode == "I;16" else image.convert("I;16B")
    if mode == "I":
        return Image.fromarray(rng.integers(-9, 70_000, (37, 23), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.random((37, 23), dtype=np.float32))
    image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    if mode == "P":
        indexed = image.convert("RGB").quantize(16)
        indexed.info["transparency"] = 3
        return indexed
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "RGBA", "LA", "PA", "P"])
@pytest.mark.parametrize("strip", [1, 23, 100, 23 * 36])
def test_strips_give_the_bits_of_the_whole_image(mode: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pixels(mode, np.random.default_rng(3))
    whole = np.asarray(as_rgb(image))
    monkeypatch.setattr(images, "_STRIP_PIXELS", strip)
    assert np.array_equal(np.asarray(as_rgb(image)), whole)
    assert whole.shape == (37, 23, 3)

"""The fastest of several ways: real computations, timed; the choice outlives the process."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast.kernels import dispatch, examples, measuring, tuning
from clipfast.kernels.registration import operations

WAYS = {("slow", "loop"): lambda x: [x @ x for _ in range(60)], ("fast", ""): lambda x: x @ x}
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def known(tmp_path: Path) -> tuning.Choices:
    return tuning.Choices(tmp_path / "choices" / "here.json")


def test_the_fastest_is_found_and_kept(known: tuning.Choices) -> None:
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    kept = json.loads(known.path.read_text())
    assert kept["square(float32[64x64])"]["chosen"] == ["fast", ""]
    times = kept["square(float32[64x64])"]["milliseconds"]
    assert 0 < times["fast"] < times["slow/loop"]


def test_a_choice_is_not_timed_again(known: tuning.Choices) -> None:
    tuning.fastest("square", [X], WAYS, known=known)

    def untouched(x: Tensor) -> Tensor:
        raise AssertionError("timed again")

    again = tuning.Choices(known.path)  # as another process reads it
    ways = dict.fromkeys(WAYS, untouched)
    assert tuning.fastest("square", [X], ways, known=again) == (("fast", ""), True)


def test_another_shape_is_another_question_but_not_another_batch(known: tuning.Choices) -> None:
    """Images are counted in powers of two."""
    assert tuning.key("op", [torch.ones(5, 3)]) == tuning.key("op", [torch.ones(8, 3)])
    keys = {
        tuning.key("op", [x, "cls", None])
        for x in (torch.ones(8, 3), torch.ones(9, 3), torch.ones(8, 4), torch.ones(8, 3).bfloat16(), torch.ones(3, 8).T)
    }
    assert len(keys) == 5
    assert tuning.key("op", [torch.ones(8, 3), "cls"]) != tuning.key("op", [torch.ones(8, 3), "mean"])


def test_what_an_operation_changes_is_copied_before_it_is_timed(known: tuning.Choices) -> None:
    x, delta = torch.zeros(4, 8), torch.ones(4, 8)
    ways = {("one", ""): lambda x, d, *_: x.add_(d), ("two", ""): lambda x, d, *_: x.add_(d).add_(0)}
    tuning.fastest("add_layer_norm", [x, delta, delta[0], delta[0], 1e-5], ways, known=known)
    assert (x.count_nonzero(), delta.sum()) == (0, 32)


def test_a_way_that_fails_is_left_out(known: tuning.Choices) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of resources: shared memory")

    ways = {("broken", ""): broken, ("fast", ""): WAYS["fast", ""]}
    assert tuning.fastest("square", [X], ways, known=known) == (("fast", ""), True)
    with pytest.raises(RuntimeError, match="shared memory"):
        tuning.fastest("other", [X], {("broken", ""): broken, ("b", ""): broken}, known=known)


def test_timing_can_be_switched_off(known: tuning.Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_TUNE", "0")
    assert tuning.fastest("square", [X], WAYS, known=known) == (("slow", "loop"), False)
    assert not known.path.exists()


def test_a_choice_that_is_no_way_any_more_is_timed_again(known: tuning.Choices) -> None:
    known.put(tuning.key("square", [X]), ("gone", ""), measuring.Measured({("gone", ""): 1.0}))
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"square(float32[64x64])": 3}'])
def test_a_damaged_file_is_no_choice(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "here.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "clipfast"):
        known = tuning.Choices(path)
    assert (str(path) in caplog.text) == (text in ("", "{"))
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    assert json.loads(path.read_text())["square(float32[64x64])"]["chosen"] == ["fast", ""]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    known = tuning.Choices(tmp_path / "file" / "here.json")
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    assert known.get(tuning.key("square", [X])) == ("fast", "")


def test_two_that_write_keep_both(tmp_path: Path) -> None:
    one, two = (tuning.Choices(tmp_path / "here.json") for _ in range(2))
    for i in range(3):
        one.put(f"one{i}", ("one", ""), measuring.Measured({("one", ""): 1.0}))
        two.put(f"two{i}", ("two", ""), measuring.Measured({("two", ""): 1.0}))
    assert len(json.loads(one.path.read_text())) == 6


def test_the_file_names_device_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    path = tuning.file_for(torch.device("cpu"))
    assert path.parent == tmp_path
    assert path.name.startswith("cpu_torch-")
    assert torch.__version__.split("+")[0] in path.name
    monkeypatch.delenv("CLIPFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuning.folder() == tmp_path / "x" / "clipfast"


# ---------------------------------------------------------------------------------------------- ways that are wrong


def spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """An operation in plain torch with the first result, or what it changes, spoilt."""
    plain = dispatch.implementation(name, "eager")
    assert plain is not None

    def run(*arguments: Any) -> Any:
        result = plain.run(*arguments)
        for place in operations()[name].mutated:
            arguments[place].copy_(change(arguments[place]))
        if isinstance(result, tuple):
            spoilt_at = (operations()[name].compared or (0,))[0]
            return tuple(change(each) if at == spoilt_at else each for at, each in enumerate(result))
        return change(result) if isinstance(result, Tensor) else result

    return run


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "not a number": lambda x: x * float("nan"),
    "a shifted row": lambda x: x.roll(1, -1),
    "a shape": lambda x: x[..., :-1],
    "2 %": lambda x: x * 1.02,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", operations())
def test_a_way_that_disagrees_with_the_definition_is_dropped(name: str, wrong: str, known: tuning.Choices) -> None:
    if wrong == "a shape" and operations()[name].mutated:
        pytest.skip("what is changed in place keeps its shape")
    plain = dispatch.implementation(name, "eager")
    assert plain is not None
    ways = {("wrong", "way"): spoilt(name, WRONG[wrong]), ("eager", ""): plain.run}
    arguments = examples.arguments(name)
    assert tuning.fastest(name, arguments, ways, known=known) == (("eager", ""), True)
    (entry,) = known.items().values()
    assert list(entry["dropped"]) == ["wrong/way"]
    assert entry["dropped"]["wrong/way"].startswith("gives the shape" if wrong == "a shape" else "disagrees: ")
    assert list(entry["milliseconds"]) == ["eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", operations())
def test_every_implementation_agrees_with_the_definition(name: str, dtype: torch.dtype) -> None:
    for backend in dispatch.BACKENDS:
        arguments = examples.arguments(name, dtype=dtype)
        if backend.name in ("native", "eager") and not dispatch.unsupported_reasons(backend, name, arguments):
            measured = measuring.measure(name, arguments, dispatch.variants(name, arguments, [backend]))
            assert not measured.dropped


def test_where_no_way_agrees_it_is_said(known: tuning.Choices) -> None:
    ways = {("wrong", ""): spoilt("attention", torch.zeros_like)}
    with pytest.raises(RuntimeError, match=r"no implementation of attention agrees with its def.*: relative err"):
        tuning.fastest("attention", examples.arguments("attention"), ways, known=known)


def test_a_definition_without_a_finite_result_drops_nothing(known: tuning.Choices) -> None:
    qkv, row = examples.arguments("attention")
    ways = {("eager", ""): dispatch.implementation("attention", "eager").run}  # type: ignore[union-attr]
    assert tuning.fastest("attention", [qkv * float("nan"), row], ways, known=known) == (("eager", ""), True)


def test_picks_of_equal_merit_do_not_disagree() -> None:
    """The directions of two texts that explain as much may be picked either way round."""
    assert operations()["span"].compared == (1,)
    ways = {
        ("other", "picks"): lambda *a: (
            (reference := dispatch.implementation("span", "eager").run(*a))  # type: ignore[union-attr]
            and (reference[0].flip(1), reference[1], reference[2].flip(1))
        )
    }
    assert not measuring.measure("span", examples.arguments("span"), ways).dropped


def test_why_a_way_fails_is_kept(known: tuning.Choices) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of resources:\n  shared memory")

    tuning.fastest("square", [X], {("broken", ""): broken, ("fast", ""): WAYS["fast", ""]}, known=known)
    dropped = json.loads(known.path.read_text())["square(float32[64x64])"]["dropped"]
    assert dropped == {"broken": "fails: RuntimeError: out of resources: shared memory"}


def test_only_sizes_that_count_images_are_rounded() -> None:
    x = torch.ones(5, 7)
    assert tuning.key("op", [x, torch.ones(5), torch.ones(3, 7)]) == "op(float32[8x7], float32[8], float32[3x7])"


# ------------------------------------------------------------------------------------------------- shipped defaults

CALL = "attention(bfloat16[64x257x3x16x64]s, cls)"
OTHER = "attention(bfloat16[1x257x3x16x64]s, cls)"
CANDIDATES = {("triton", "a"): None, ("triton", "b"): None, ("eager", ""): None}


def defaults(source: str) -> tuning.Defaults:
    return tuning.Defaults({"source": source, "orders": {CALL: ["triton/gone", "triton/b"], OTHER: ["eager"]}})


def test_the_first_that_there_is_leads() -> None:
    assert defaults("modelled").first(CALL, CANDIDATES) == ("triton", "b")
    assert defaults("modelled").first(OTHER, CANDIDATES) == ("eager", "")
    assert defaults("modelled").first("attention(bfloat16[64x50x3x12x64]s, cls)", CANDIDATES) is None


def test_another_number_of_images_takes_the_nearest() -> None:
    for images, way in ((2, ("eager", "")), (4, ("eager", "")), (16, ("triton", "b")), (1024, ("triton", "b"))):
        call = CALL.replace("64x257", f"{images}x257")
        assert defaults("measured").first(call, CANDIDATES) == way
        assert defaults("measured").first(call, CANDIDATES, exact=True) is None


def test_all_sizes_that_count_images_are_left_out() -> None:
    general = tuning._without_images("op(float32[8x7], float32[8], float32[3x8])")
    assert general == ("op(float32[Bx7], float32[B], float32[3x8])", 3.0)


def test_the_shipped_files_are_what_they_say() -> None:
    files = sorted(tuning.DEFAULTS.glob("*.json"))
    assert [file.stem for file in files] == ["sm_100", "sm_80", "sm_90"]
    for file in files:
        document = json.loads(file.read_text())
        assert f"sm_{document['capability']}" == file.stem
        assert document["source"] in ("modelled", "measured")
        assert (document["device"] is None) == (document["source"] == "modelled")
        assert all(order and len(set(order)) == len(order) for order in document["orders"].values())
        assert {call.partition("(")[0] for call in document["orders"]} <= {*operations()}


def test_a_gpu_takes_the_file_of_its_generation() -> None:
    tuning.defaults.cache_clear()
    assert tuning.defaults(86)._orders == tuning.defaults(80)._orders != {}
    assert tuning.defaults(70)._orders == {}


def test_what_was_measured_becomes_an_order(known: tuning.Choices) -> None:
    known.put(
        CALL, ("triton", "b"), measuring.Measured({("triton", "a"): 2.0, ("triton", "b"): 1.0, ("eager", ""): 3.0})
    )
    measured = tuning.orders(known.items())
    assert measured == {CALL: ["triton/b", "triton/a", "eager"]}
    document = tuning.defaults_document(90, measured, source="measured", device="GPU")
    assert document["orders"] == measured  # none of the modelled ones
    assert tuning.Defaults(document).measured


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arguments count as on a GPU of sm_90 with defaults of a given source, and none is captured."""
    monkeypatch.setattr(tuning, "device_of", lambda arguments: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: measuring.Measured({("triton", "a"): 1.0}))

    def have(source: str) -> None:
        monkeypatch.setattr(tuning, "defaults", lambda capability: defaults(source))
        monkeypatch.setattr(tuning, "key", lambda operation, arguments: CALL)

    return have


@pytest.mark.parametrize(
    ("tune", "source", "found"),
    [
        ("0", "modelled", (("triton", "b"), False)),
        ("0", "measured", (("triton", "b"), False)),
        (None, "modelled", (("triton", "a"), True)),
        (None, "measured", (("triton", "b"), True)),
        ("1", "measured", (("triton", "a"), True)),
    ],
)
def test_when_defaults_count(
    gpu: Callable[[str], None],
    known: tuning.Choices,
    monkeypatch: pytest.MonkeyPatch,
    tune: str | None,
    source: str,
    found: tuple[tuple[str, str], bool],
) -> None:
    gpu(source)
    monkeypatch.delenv("CLIPFAST_TUNE", raising=False)
    if tune is not None:
        monkeypatch.setenv("CLIPFAST_TUNE", tune)
    assert tuning.fastest("attention", [X], CANDIDATES, known=known) == found  # type: ignore[arg-type]


def test_nothing_is_timed_in_a_capture_and_the_choice_is_not_final(
    gpu: Callable[[str], None], known: tuning.Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("modelled")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.fastest("attention", [X], CANDIDATES, known=known) == (("triton", "b"), False)  # type: ignore[arg-type]
    assert tuning.postponed(torch.device("cuda:0"))
    assert not known.items()


def test_threads_may_share_choices(known: tuning.Choices) -> None:
    def put(i: int) -> None:
        known.put(f"op{i}", ("one", ""), measuring.Measured({("one", ""): 1.0}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(64)))
    assert len(tuning.Choices(known.path).items()) == 64


# -------------------------------------------------------------------------------------- captures, without a GPU


class Cuda:
    """Stands for torch's streams and graphs; notes in what order they are used, on which device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = 0
        self.streams = {0: "default 0", 1: "default 1"}
        self.done: list[str] = []
        self.cannot_capture = False
        cuda = self

        class Stream:
            def __init__(self, device: torch.device | None = None, name: str = "") -> None:
                self.name = name or f"side {device.index}"  # type: ignore[union-attr]

            def wait_stream(self, other: "Stream") -> None:
                cuda.done.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                cuda.done.append("replay")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                pass

            synchronize = record

            def elapsed_time(self, other: "Event") -> float:
                return 8.0  # milliseconds

        @contextmanager
        def device_(device: Any) -> Iterator[None]:
            before, cuda.device = cuda.device, torch.device(device).index
            yield
            cuda.device = before

        @contextmanager
        def stream_(stream: Stream) -> Iterator[None]:
            before, cuda.streams[cuda.device] = cuda.streams[cuda.device], stream.name
            yield
            cuda.streams[cuda.device] = before

        @contextmanager
        def graph_(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"  # other threads may use their GPUs meanwhile
            if cuda.cannot_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            with stream_(stream):
                cuda.done.append("capture begins")
                yield
                cuda.done.append("capture ends")

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "Event": Event,
            "device": device_,
            "stream": stream_,
            "graph": graph_,
            "current_stream": lambda device: Stream(name=self.streams[device.index]),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, *arguments: Any) -> None:
        """Queues something."""
        self.done.append(f"run on {self.streams[self.device]}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_capture_waits_and_is_waited_for_on_its_own_device(cuda: Cuda) -> None:
    measuring.capture(cuda.run, torch.device("cuda:1"), warmup=2)
    assert cuda.device == 0
    assert cuda.done == [
        "side 1 waits for default 1",
        "run on side 1",
        "run on side 1",
        "capture begins",
        "run on side 1",
        "capture ends",
        "default 1 waits for side 1",
    ]


def test_what_is_timed_is_a_replay(cuda: Cuda) -> None:
    timer = measuring._timer(cuda.run, [X], torch.device("cuda:0"))
    before = len(cuda.done)
    assert timer() == pytest.approx(8e-3 / measuring._RUNS)
    assert cuda.done[before:] == ["replay"]


def test_what_cannot_be_captured_is_timed_as_it_runs(cuda: Cuda) -> None:
    cuda.cannot_capture = True
    timer = measuring._timer(cuda.run, [X], torch.device("cuda:0"))
    before = len(cuda.done)
    assert timer() == pytest.approx(8e-3 / measuring._RUNS)
    assert cuda.done[before:] == ["run on default 0"] * measuring._RUNS


def test_versions_are_read_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes half a millisecond each."""
    read: list[str] = []
    monkeypatch.setattr(tuning, "version", lambda package: read.append(package) or "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    tuning._file_name.cache_clear()
    files = {tuning.file_for(torch.device(device)) for device in ("cuda:0", "cuda:1", "cuda:0")}
    tuning._file_name.cache_clear()
    assert len(files) == 1
    assert read == ["torch", "triton", "clipfast"]


# -------------------------------------------------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))])
def test_ways_are_timed_on_the_gpu_that_has_the_tensors(device: str, known: tuning.Choices) -> None:
    x = X.to(device)
    assert tuning.fastest("square", [x], WAYS, known=known) == (("fast", ""), True)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        assert tuning.fastest("cube", [x], WAYS, known=known) == (("fast", ""), True)


@needs_gpu
def test_a_way_that_cannot_be_captured_is_timed_without_a_graph(known: tuning.Choices) -> None:
    ways = {("waits", ""): lambda x: (x @ x).sum().item(), ("fast", ""): WAYS["fast", ""]}
    assert tuning.fastest("square", [X.cuda()], ways, known=known) == (("fast", ""), True)
    assert {*known.items()["square(float32[64x64])"]["milliseconds"]} == {"waits", "fast"}


@needs_gpu
def test_kernels_are_compiled_ahead_and_not_run() -> None:
    arguments = examples.arguments("attention", "cuda", torch.bfloat16)
    dispatch.forget()
    with tuning.compiling_ahead():
        dispatch.choose_known("attention", arguments).run(*arguments)
    assert not dispatch.known_calls(arguments[0].device)
    out, _ = dispatch.choose_known("attention", arguments).run(*arguments)
    assert out.isfinite().all()

"""Forwards as CUDA graphs: refused without a GPU, when they are captured and shared, the same numbers with one."""

import copy
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from builders import pixels, vision_tower
from measures import error
from tolerances import FLOAT32

import clipfast
from clipfast import Contributions, InputError, Model, graphs
from clipfast.graphs import ANY_BATCH, KEPT, Graphs
from clipfast.kernels import dispatch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_model_on_the_cpu_is_refused() -> None:
    for option in (8, True):
        with pytest.raises(InputError, match="cuda_graphs needs a model on a CUDA device, and this one is on cpu"):
            clipfast.wrap(vision_tower(), cuda_graphs=option)
    with pytest.raises(InputError, match="cuda_graphs needs a model on a CUDA device"):
        clipfast.load("scenes", device="cpu", cuda_graphs=8)


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(InputError, match="cuda_graphs is -1: it is the largest batch to capture, 0 for none"):
        clipfast.wrap(vision_tower(), cuda_graphs=-1)


def test_one_option_says_whether_there_are_graphs() -> None:
    for option, largest in ((None, ANY_BATCH), (False, 0), (0, 0)):
        assert clipfast.wrap(vision_tower(), cuda_graphs=option)._graphs.largest == largest
    module = vision_tower()
    assert clipfast.model._graphs(True, torch.device("cuda:1")).largest == ANY_BATCH
    assert clipfast.model._graphs(1, torch.device("cuda:1")).largest == 1
    assert clipfast.wrap(module).graph_nbytes == 0


def test_a_model_that_moved_to_the_cpu_runs_there() -> None:
    """No graph is asked for a batch that is not on a GPU."""
    model = clipfast.wrap(vision_tower())
    images = pixels(model.module, 2)
    assert not model._graphs.takes(images)
    assert model.decompose(images).max_error() <= FLOAT32


# ------------------------------------------------------------------------- captures and replays, on the CPU for a GPU


class Gpu:
    """Stands for CUDA's graphs: a replay computes into the memory of the capture, as a GPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = threading.local()
        self.captures: list[dict[str, Any]] = []
        self.replays = 0
        self.fails: str | None = None
        self.reserved = 0
        monkeypatch.setattr(graphs, "current_stream", lambda device: getattr(self.stream, "current", 0))
        monkeypatch.setattr(graphs, "new_pool", object)
        monkeypatch.setattr(graphs, "reserved", lambda device: self.reserved)
        monkeypatch.setattr(graphs, "capture", self.capture)
        self.result: Contributions | None = None

    def capture(self, run: Callable[[], None], device: torch.device, warmup: int, pool: Any) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        assert not torch.is_inference_mode_enabled()
        self.captures.append({"device": device, "pool": pool, "stream": getattr(self.stream, "current", 0)})
        self.reserved += 1000
        run()
        (results,) = [cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, list)]  # type: ignore[union-attr]
        (static,) = results
        gpu = self

        class Graph:
            def replay(self) -> None:
                gpu.replays += 1
                run()
                for name, tensor in static._tensors().items():
                    tensor.copy_(results[0]._tensors()[name])

        return Graph()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture(scope="module")
def plain() -> Model:
    return clipfast.wrap(vision_tower())


Forward = Callable[[torch.Tensor], Contributions]


def runner(plain: Model, kept: Graphs) -> Callable[..., Contributions]:
    return lambda images, key="one": kept.run(images, key, lambda static: plain.decompose(static, attention=True))


def same(have: Contributions, expected: Contributions) -> bool:
    return all(torch.equal(have._tensors()[name], tensor) for name, tensor in expected._tensors().items())


def test_a_shape_is_captured_at_its_second_call(gpu: Gpu, plain: Model) -> None:
    kept = Graphs(ANY_BATCH)
    run = runner(plain, kept)
    for call, (captures, replays) in enumerate(((0, 0), (1, 1), (1, 2))):
        images = pixels(plain.module, 3, seed=call)
        assert same(run(images), plain.decompose(images, attention=True))
        assert (len(gpu.captures), gpu.replays) == (captures, replays)
    run(pixels(plain.module, 2))
    assert (kept.count, len(gpu.captures)) == (1, 1)
    assert kept.nbytes == 1000
    kept.forget()
    assert (kept.count, kept.nbytes) == (0, 0)


def test_a_result_is_the_callers_own_and_not_the_graphs(gpu: Gpu, plain: Model) -> None:
    run = runner(plain, Graphs(ANY_BATCH))
    first, second = pixels(plain.module, 2), pixels(plain.module, 2, seed=1)
    run(first)
    kept = run(first)
    run(second)
    assert same(kept, plain.decompose(first, attention=True))


def test_a_graph_of_inference_mode_is_of_use_outside(gpu: Gpu, plain: Model) -> None:
    run = runner(plain, Graphs(ANY_BATCH))
    with torch.inference_mode():
        for call in range(3):
            inside = run(pixels(plain.module, 2, seed=call))
            assert inside.codes.is_inference()
    images = pixels(plain.module, 2, seed=5)
    outside = run(images)
    assert not outside.codes.is_inference()
    assert same(outside, plain.decompose(images, attention=True))
    with torch.inference_mode():
        assert same(run(images), outside)
    assert len(gpu.captures) == 1


def test_streams_share_no_graph_and_no_memory(gpu: Gpu, plain: Model) -> None:
    kept = Graphs(ANY_BATCH)
    run = runner(plain, kept)
    for stream in (7, 8, 7, 8, 7):
        gpu.stream.current = stream
        run(pixels(plain.module, 2))
    assert [each["stream"] for each in gpu.captures] == [7, 8]
    assert gpu.captures[0]["pool"] is not gpu.captures[1]["pool"]
    for _ in range(2):
        run(pixels(plain.module, 3))
    assert gpu.captures[2]["pool"] is gpu.captures[0]["pool"]  # one after the other on one stream


@pytest.mark.parametrize("streams", ["one", "each its own"])
def test_threads_do_not_see_each_others_images(gpu: Gpu, plain: Model, streams: str) -> None:
    run = runner(plain, Graphs(ANY_BATCH))

    def work(thread: int) -> bool:
        gpu.stream.current = thread if streams == "each its own" else 0
        images = [pixels(plain.module, 2, seed=10 * thread + draw) for draw in range(6)]
        return all(same(run(each), plain.decompose(each, attention=True)) for each in images)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert 1 <= len(gpu.captures) <= 4


def test_few_graphs_are_kept_and_the_last_used_stay(gpu: Gpu, plain: Model) -> None:
    kept = Graphs(ANY_BATCH)
    run = runner(plain, kept)
    images = pixels(plain.module, 1)
    for key in range(KEPT):
        run(images, key), run(images, key)
    run(images, 0)
    run(images, "new"), run(images, "new")
    assert kept.count == KEPT
    before = len(gpu.captures)
    run(images, 0)
    assert len(gpu.captures) == before
    run(images, 1)
    assert len(gpu.captures) == before + 1


def test_what_cannot_be_captured_runs_and_is_said_once(
    gpu: Gpu, plain: Model, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fails = "operation not permitted when\nstream is capturing"
    run = runner(plain, Graphs(ANY_BATCH))
    with caplog.at_level(logging.WARNING, "clipfast"):
        for call in range(4):
            images = pixels(plain.module, 2, seed=call)
            assert same(run(images), plain.decompose(images, attention=True))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a forward runs without a CUDA graph: operation not permitted when stream is capturing"]


def test_a_copy_has_no_graphs(gpu: Gpu, plain: Model) -> None:
    kept = Graphs(5)
    run = runner(plain, kept)
    for _ in range(2):
        run(pixels(plain.module, 1))
    other = copy.deepcopy(kept)
    assert (other.largest, other.count, kept.count) == (5, 0, 1)


def test_bases_are_told_apart_after_one_is_gone() -> None:
    model = clipfast.wrap(vision_tower())
    serials = [clipfast.wrap(model.module).basis().serial for _ in range(3)]
    assert len(set(serials)) == 3


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def pair() -> tuple[Model, Model]:
    module = vision_tower().to("cuda")
    return clipfast.wrap(module, cuda_graphs=4), clipfast.wrap(module, cuda_graphs=False)


@needs_gpu
def test_a_replay_gives_what_the_forward_gives(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    for count in (1, 4, 5, 1):  # 5 is too large for a graph
        for draw in range(3):
            images = torch.randn_like(pixels(plain.module, count).cuda()) + draw
            have, expected = (model.decompose(images, attention=True) for model in (graphed, plain))
            for name, tensor in expected._tensors().items():
                assert error(have._tensors()[name].cpu(), tensor.cpu()) <= FLOAT32, name
    assert graphed._graphs.count == 2
    assert graphed.graph_nbytes > 0


@needs_gpu
def test_results_are_the_callers_own(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    first, second = (torch.randn_like(pixels(plain.module, 2).cuda()) for _ in range(2))
    graphed.decompose(first)
    kept = graphed.decompose(first)
    before = kept.codes.clone()
    graphed.decompose(second)
    assert torch.equal(kept.codes, before)


@needs_gpu
@pytest.mark.parametrize("change", [lambda p: p.mul_(1.1), lambda p: setattr(p, "data", p.data * 1.1)])
def test_weights_that_change_are_seen(pair: tuple[Model, Model], change: Callable[[torch.Tensor], object]) -> None:
    graphed, plain = pair
    images = pixels(plain.module, 2).cuda()
    for _ in range(2):
        graphed.decompose(images)
    with torch.no_grad():
        for parameter in plain.module.parameters():
            change(parameter)
    for _ in range(2):
        assert error(graphed.decompose(images).heads().cpu(), plain.decompose(images).heads().cpu()) <= FLOAT32


@needs_gpu
def test_few_graphs_are_kept(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    images = pixels(plain.module, 1).cuda()
    for layers in range(KEPT + 2):
        for _ in range(2):
            graphed.decompose(images, layers=[layers % plain.tower.layers], attention=layers >= plain.tower.layers)
    assert graphed._graphs.count <= KEPT


@needs_gpu
def test_a_captured_graph_of_inference_mode_is_of_use_outside(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    images = pixels(plain.module, 2).cuda()
    with torch.inference_mode():
        for _ in range(3):
            graphed.decompose(images)
    other = torch.randn_like(images)
    assert error(graphed.decompose(other).codes.cpu(), plain.decompose(other).codes.cpu()) <= FLOAT32


@needs_gpu
def test_a_side_stream_waits_for_what_made_the_images(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    side = torch.cuda.Stream()
    images = pixels(plain.module, 2).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for draw in range(4):
            moving = images + draw
            have = graphed.decompose(moving)
            side.synchronize()
            assert error(have.codes.cpu(), plain.decompose(moving).codes.cpu()) <= FLOAT32


@needs_gpu
@pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))])
def test_every_gpu_captures_whichever_is_current(device: str) -> None:
    module = vision_tower().to(device)
    graphed, plain = clipfast.wrap(module), clipfast.wrap(module, cuda_graphs=False)
    for draw in range(3):
        images = torch.randn_like(pixels(module, 2).to(device)) + draw
        assert error(graphed.decompose(images).codes.cpu(), plain.decompose(images).codes.cpu()) <= FLOAT32
    assert graphed._graphs.count == 1


@needs_gpu
def test_threads_and_streams_replay_at_once(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    batches = [torch.randn_like(pixels(plain.module, 2).cuda()) for _ in range(24)]
    expected = [plain.decompose(images).codes.cpu() for images in batches]
    torch.cuda.synchronize()

    def work(thread: int) -> bool:
        stream = torch.cuda.Stream() if thread % 2 else torch.cuda.current_stream()
        fine = True
        with torch.cuda.stream(stream):
            for place in range(thread, len(batches), 4):
                have = graphed.decompose(batches[place]).codes
                stream.synchronize()
                fine &= error(have.cpu(), expected[place]) <= FLOAT32
        return fine

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_models_on_several_gpus_are_used_at_once() -> None:
    models = [clipfast.wrap(vision_tower().to(f"cuda:{index}")) for index in range(torch.cuda.device_count())]
    images = pixels(models[0].module, 2)
    expected = clipfast.wrap(vision_tower()).decompose(images)

    def work(model: Model) -> float:
        return max(error(model.decompose(images).codes.cpu(), expected.codes) for _ in range(5))

    with ThreadPoolExecutor(len(models)) as pool:
        assert max(pool.map(work, models)) <= FLOAT32


def test_threads_with_a_model_each_decompose_at_once() -> None:
    """Choices, buffers and caches of several devices' threads are filled at one time."""
    dispatch.forget()
    modules = [vision_tower(seed=seed) for seed in range(4)]
    images = [pixels(module, 3, seed=seed) for seed, module in enumerate(modules)]
    start = threading.Barrier(len(modules), timeout=60)

    def work(place: int) -> Contributions:
        model = clipfast.wrap(modules[place])
        start.wait()
        return [model.decompose(images[place], attention=True) for _ in range(3)][-1]

    with ThreadPoolExecutor(len(modules)) as pool:
        together = list(pool.map(work, range(len(modules))))
    for have, module, batch in zip(together, modules, images, strict=True):
        assert same(have, clipfast.wrap(module).decompose(batch, attention=True))

"""Launches: on whose device they run, what is run instead of them, and what they are compiled for."""

import threading
from typing import Any

import pytest
import torch
from contracting import draw
from torch._subclasses.fake_tensor import FakeTensorMode

from clipfast.kernels import launch
from clipfast.kernels.attention import sdpa, tiles
from clipfast.kernels.launch import Launch
from clipfast.kernels.layer_norm import triton as layer_norm


class Kernel:
    """Notes the current device of every launch."""

    def __init__(self, gpus: "Gpus") -> None:
        self.gpus = gpus
        self.launched_on: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **options: self.launched_on.append(self.gpus.current)


class Gpus:
    """Torch's current device, where there is no GPU that it could be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.switches = 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", lambda index: self.Switch(self, index))

    class Switch:
        def __init__(self, gpus: "Gpus", index: int) -> None:
            self.gpus, self.index = gpus, index

        def __enter__(self) -> None:
            self.before, self.gpus.current = self.gpus.current, self.index
            self.gpus.switches += 1

        def __exit__(self, *raised: object) -> None:
            self.gpus.current = self.before


def launch_on(device: str, kernel: Any) -> Launch:
    with FakeTensorMode():
        return Launch(kernel, (1,), {"rows": 3, "p_x": torch.empty(3, device=device)}, {})


def test_a_kernel_is_launched_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch)
    kernel = Kernel(gpus)
    launch_on("cuda:1", kernel).run()
    assert (kernel.launched_on, gpus.current, gpus.switches) == ([1], 0, 1)
    launch_on("cuda:0", kernel).run()
    assert (kernel.launched_on, gpus.switches) == ([1, 0], 1)  # no guard where none is needed


def test_a_tensor_in_a_descriptor_says_where_too() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = TensorDescriptor.from_tensor(torch.empty(16, 16, device="meta"), [16, 16])
    assert Launch(None, (1,), {"rows": 1, "p_x": described}, {}).device.type == "meta"
    with pytest.raises(ValueError, match="no tensor among its arguments"):
        _ = Launch(None, (1,), {"rows": 1}, {}).device


def test_descriptors_of_a_known_kind_are_as_tritons_own() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    for tensor in (torch.randn(2, 48, 64), torch.randn(2, 64, 48).transpose(0, 1), torch.randn(2, 48, 64)):
        block = (1, 16, 32)
        own = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
        for _ in range(2):
            described = launch.describe(tensor, block)
            assert type(described) is TensorDescriptor
            assert described.base is tensor
            assert {**vars(described), "base": 0} == {**vars(own), "base": 0}


def test_a_descriptor_is_refused_whether_its_kind_is_known_or_not() -> None:
    whole = torch.empty(8, 68)
    launch.describe(whole[:, :64], (8, 32))
    with pytest.raises(ValueError, match="starts 4 bytes after a multiple of 16"):
        launch.describe(whole[:, 1:65], (8, 32))
    with pytest.raises(AssertionError):  # Triton's
        launch.describe(torch.empty(8, 65)[:, :64], (8, 32))


def test_few_kinds_of_descriptors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_DESCRIBED", {})
    monkeypatch.setattr(launch, "MOST_DESCRIBED", 3)
    for rows in range(1, 9):
        assert launch.describe(torch.empty(rows, 16), (8, 16)).shape == [rows, 16]
        assert 1 <= len(launch._DESCRIBED) <= 3


def test_powers_of_two() -> None:
    sizes = [0, 1, 2, 3, 5, 16, 17, 768, 1024, 1025]
    assert [launch.power_of_two(size) for size in sizes] == [1, 1, 2, 4, 8, 16, 32, 1024, 1024, 2048]
    assert [launch.power_of_two(size, 16) for size in (0, 3, 17)] == [16, 16, 32]


def test_what_is_run_instead_is_the_threads_own() -> None:
    meta = [torch.empty(shape, device="meta") for shape in ((4, 8), (8,), (8,))]
    seen: list[Launch] = []
    with launch.instead(seen.append):
        out = layer_norm.run(meta[0], None, *meta[1:], 1e-5)
        other = threading.Thread(target=lambda: seen.append(launch._thread.launcher))  # type: ignore[arg-type]
        other.start()
        other.join()
    assert out.shape == (4, 8)
    assert [type(each) for each in seen] == [Launch, type(None)]
    assert seen[0].options()["WIDTH"] == 8
    assert launch._thread.launcher is None


def test_an_assumed_gpu_counts_for_tensors_that_are_on_none() -> None:
    qkv = torch.empty(2, 257, 3, 4, 64, dtype=torch.bfloat16, device="meta")
    assert launch.capability(qkv) == 90
    with launch.assume(80):
        assert launch.capability(qkv) == 80
        with launch.assume(100):
            assert launch.capability(qkv) == 100
        assert not any(config.blocks["DESCRIPTORS"] for config in tiles.configs(qkv)) or launch.INTERPRETED
    assert launch.capability(qkv) == 90


def test_torchs_attention_is_offered_by_the_formats_it_takes() -> None:
    labels = [
        [label for label, _ in sdpa.ways(draw(0, 1, 9, 3, 1, 64, dtype=dtype))]
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    ]
    assert labels == [["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]] * 2 + [["sdpa-efficient"], []]


def test_torchs_attention_has_the_shapes_of_the_operation() -> None:
    query = torch.empty(2, 3, 9, 64, dtype=torch.bfloat16, device="meta")
    for label, attend in sdpa.ways(torch.empty(2, 9, 3, 3, 64, dtype=torch.bfloat16, device="meta")):
        assert attend(query, query, query).shape == query.shape, label

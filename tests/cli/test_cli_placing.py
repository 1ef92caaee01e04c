"""Which engine runs, and where, for the options of a pass and the devices that there are."""

import pytest
import torch

from clipfast.commands.collect.options import RunOptions
from clipfast.commands.running import Placed
from clipfast.errors import InputError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Has torch count so many CUDA devices; nothing is computed on them."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("gpus", "options", "device", "expected"),
    [
        (0, RunOptions(), None, ("serial", None, "", (), None)),
        (0, RunOptions(workers=1), "cpu", ("serial", CPU, "cpu", (), None)),
        (0, RunOptions(workers=3), None, ("local", CPU, "cpu", (), 3)),
        (0, RunOptions(engine="local"), None, ("local", CPU, "cpu", (), None)),
        (1, RunOptions(), None, ("serial", None, "", (), None)),
        (1, RunOptions(engine="local"), None, ("local", CPU, "cuda", (), None)),
        (4, RunOptions(), None, ("local", CPU, "cuda", (), None)),
        (4, RunOptions(), "cuda", ("local", CPU, "cuda", (), None)),
        (4, RunOptions(), "cuda:2", ("serial", torch.device("cuda:2"), "cuda:2", (), None)),
        (4, RunOptions(workers=2), "cuda:2", ("local", CPU, "cuda:2", ("cuda:2",), 2)),
        (4, RunOptions(), "cpu", ("serial", CPU, "cpu", (), None)),
        (4, RunOptions(devices=("cuda:1,cuda:3",)), None, ("local", CPU, "cuda", ("cuda:1", "cuda:3"), None)),
        (4, RunOptions(devices=("cuda:1", "cuda:3")), None, ("local", CPU, "cuda", ("cuda:1", "cuda:3"), None)),
        (4, RunOptions(devices=("cuda:3",)), None, ("serial", torch.device("cuda:3"), "cuda:3", (), None)),
        (4, RunOptions(engine="serial"), None, ("serial", None, "", (), None)),
        (0, RunOptions(engine="ray"), None, ("ray", CPU, "cpu", (), None)),
        (0, RunOptions(ray_address="auto"), None, ("ray", CPU, "cpu", (), None)),
        (0, RunOptions(engine="ray"), "cpu", ("ray", CPU, "cpu", ("cpu",), None)),
        (0, RunOptions(engine="ray"), "cuda", ("ray", CPU, "cuda", (), None)),
        (0, RunOptions(ray_address="auto", devices=("cuda",)), None, ("ray", CPU, "cuda", ("cuda",), None)),
    ],
    indirect=["gpus"],
)
def test_engine_and_devices(gpus: int, options: RunOptions, device: str | None, expected: tuple[object, ...]) -> None:
    placed = Placed.of(options, device)
    assert (placed.engine, placed.load, placed.device, placed.devices, placed.workers) == expected


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (RunOptions(), "cuda:2", "there is no device cuda:2"),
        (RunOptions(devices=("cuda:0", "cuda:7")), None, "there is no device cuda:7"),
        (RunOptions(devices=("gpu",), engine="ray"), None, "no device is called 'gpu'"),
        (RunOptions(devices=("cuda:0,cuda:1",), engine="serial"), None, "--engine serial is one worker"),
    ],
)
def test_devices_that_are_not_there(gpus: int, options: RunOptions, device: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placed.of(options, device)

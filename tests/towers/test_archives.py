"""TorchScript archives: their weights are read to the bit, and nothing in them is run."""

import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import clip_model
from torch import nn

from clipfast.errors import ModelError
from clipfast.towers import archives

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Inner(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4).to(dtype)
        self.sizes = [1, 2, 3]
        self.register_buffer("counts", torch.arange(6).view(2, 3).T)  # not contiguous

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * sum(self.sizes)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = Inner(torch.float16), Inner(torch.float64)
        self.weight = nn.Parameter(torch.randn(2, 5))
        self.row = nn.Parameter(self.weight.data[1])  # of the same storage
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.long(x.double())) + self.short(x.half())


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    torch.jit.script(Outer()).save(str(path))
    return path


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        pytest.fail("torch.jit.load compiles the code of an archive")

    monkeypatch.setattr(torch.jit, "load", load)


def test_weights_are_those_of_the_state_dict(archive: Path) -> None:
    torch.manual_seed(0)
    expected = Outer().state_dict()
    read = archives.read(archive)
    assert archives.is_archive(archive)
    assert read.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read.weights[name].dtype == tensor.dtype, name
        assert torch.equal(read.weights[name], tensor), name
    assert read.classes == {"Outer", "Inner", "Linear", "GELU"}
    assert archives.uses_quick_gelu(read.classes) is False
    assert archives.uses_quick_gelu(frozenset({"QuickGELU", "GELU"})) is True
    assert archives.uses_quick_gelu(frozenset({"ReLU"})) is None
    assert archives.read(archive, tensors=False) == archives.Archive({}, read.classes)


def test_a_scripted_model_of_open_clip(tmp_path: Path) -> None:
    clip = clip_model()
    torch.jit.script(clip).save(str(tmp_path / "clip.pt"))
    read = archives.read(tmp_path / "clip.pt").weights
    expected = clip.state_dict()
    assert set(read) - {"attn_mask"} == set(expected)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("PK")
    assert not any(map(archives.is_archive, [tmp_path / "weights.pt", tmp_path / "text.pt", tmp_path, None, "no file"]))


# ----------------------------------------------------------------------------------------------------- what is refused


def rewritten(archive: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> Path:
    """A copy of an archive after ``change(name, data)`` of every entry; None leaves one out."""
    path = archive.with_name("changed.pt")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", **options) as target:
        for entry in source.infolist():
            changed = change(entry.filename, source.read(entry))
            if changed is not None:
                target.writestr(*changed)
    return path


def with_pickle(archive: Path, data: bytes) -> Path:
    return rewritten(archive, lambda name, old: (name, data if name.endswith("/data.pkl") else old))


class Call:
    """Unpickled, it is the result of a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


RAN: list[object] = []


def run_me(*arguments: object) -> object:
    RAN.append(arguments)
    return torch.nn.Module()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(run_me, 1), "run_me"),
        (Call(eval, "RAN.append(1)"), r"(builtins|__builtin__)\.eval"),
        (Call(getattr, "torch", "load"), r"(builtins|__builtin__)\.getattr"),
        (Call(torch.load, "weights.pt"), r"torch\.serialization\.load"),
        (Call(torch.nn.Linear, 2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (Call(torch._utils._rebuild_parameter, 1, True, {}), r"torch\._utils\._rebuild_parameter"),
    ],
    ids=["own", "eval", "getattr", "load", "Linear", "parameter"],
)
def test_nothing_that_a_pickle_names_is_called(call: Call, name: str, protocol: int, archive: Path) -> None:
    RAN.clear()
    path = with_pickle(archive, pickle.dumps({"weight": call}, protocol))
    for tensors in (True, False):
        with pytest.raises(
            ModelError, match=rf"^the archive {path} is not loaded: it holds more than weights .*{name}"
        ):
            archives.read(path, tensors=tensors)
    assert RAN == []


def test_the_same_pickle_is_run_by_an_ordinary_unpickler(archive: Path) -> None:
    """Else the test above would show nothing."""
    RAN.clear()
    pickle.loads(pickle.dumps(Call(run_me, 1)))
    assert RAN == [(1,)]


def written(*operations: bytes) -> bytes:
    """A pickle of a module with one tensor, opcode by opcode."""
    return b"\x80\x02c__torch__\nModel\n)\x81}X\x06\x00\x00\x00weight" + b"".join(operations) + b"sb."


def tensor(count: int, size: int, key: bytes = b"0", storage: bytes = b"FloatStorage", offset: int = 0) -> bytes:
    """Opcodes of a tensor ``[size]``."""
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + storage + b"\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    numbers = b"K%b(K%bt(K\x01t" % (bytes([offset]), bytes([size]))
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + pid + b"K%bt" % bytes([count]) + b"Q" + numbers + b"\x89ccollections\nOrderedDict\n)RtR"


def archive_of(data: bytes, folder: Path, storage: bytes = bytes(16), **more: bytes) -> Path:
    path = folder / "written.pt"
    with zipfile.ZipFile(path, "w") as target:
        entries = {"data.pkl": data, "data/0": storage, "constants.pkl": b"", "byteorder": sys.byteorder.encode()}
        for name, content in {**entries, **more}.items():
            target.writestr(f"model/{name}", content)
    return path


def test_the_written_archive_is_read(tmp_path: Path) -> None:
    numbers = torch.arange(4.0)
    path = archive_of(written(tensor(4, 3, offset=1)), tmp_path, numbers.numpy().tobytes())
    assert torch.equal(archives.read(path).weights["weight"], numbers[1:])


DAMAGED: dict[str, tuple[bytes, str]] = {
    "beyond its storage": (written(tensor(4, 5)), "damaged"),
    "beyond its storage by an offset": (written(tensor(4, 4, offset=1)), "damaged"),
    "storage of another size": (written(tensor(5, 4)), "its storage 0 has 16 bytes in place of 20"),
    "storage that is missing": (written(tensor(4, 4, key=b"7")), "damaged"),
    "quantised storage": (written(tensor(4, 4, storage=b"QInt8Storage")), r"it holds more than weights \(torch\.QInt8"),
    "state of a tensor": (written(tensor(4, 4), b"}b"), "a tensor in it has a state of its own kind"),
    "no module": (pickle.dumps({"weight": 1}, 2), "it holds no module"),
    "state that is no dictionary": (b"\x80\x02c__torch__\nModel\n)\x81K\x01b.", "a module in it has a state"),
    "modules in each other": (b"\x80\x02c__torch__\nModel\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "hold each other"),
    "half a pickle": (written(tensor(4, 4))[:40], "damaged"),
    "nothing": (b"", "damaged"),
    "a storage in place of a number": (written(b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))t", b"R"), "plain"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archives_are_one_line(case: str, tmp_path: Path) -> None:
    data, match = DAMAGED[case]
    with pytest.raises(ModelError, match=match) as caught:
        archives.read(archive_of(data, tmp_path))
    assert "\n" not in str(caught.value)


def test_other_entries_that_are_not_read(archive: Path, tmp_path: Path) -> None:
    swapped = "big" if sys.byteorder == "little" else "little"
    with pytest.raises(ModelError, match="another byte order"):
        archives.read(archive_of(written(tensor(4, 4)), tmp_path, byteorder=swapped.encode()))
    compressed = rewritten(archive, lambda name, data: (name, data), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="its storage 0 has"):
        archives.read(compressed)
    without = rewritten(archive, lambda name, data: None if name.endswith("/data.pkl") else (name, data))
    with pytest.raises(ModelError, match="damaged"):
        archives.read(without)
    large = with_pickle(archive, bytes((64 << 20) + 1))
    with pytest.raises(ModelError, match="its pickle is larger than 64 MB"):
        archives.read(large)

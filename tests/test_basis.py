"""The basis in numbers that anyone can verify: columns, copies, and which bases are the same."""

from typing import Any

import pytest
import torch
from builders import vision_tower
from torch import Tensor

from clipfast import InputError, wrap
from clipfast.basis import StoredBasis, fold
from clipfast.towers import openclip


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stored_basis(**changes: Any) -> StoredBasis:
    """Two layers of two heads of width 1, two columns; only layer 1 has values."""
    parts = {
        "biases": float64([[1, 2], [3, 4]]),
        "mean_row": float64([10, 20]),
        "std_row": float64([100, 200]),
        "heads": 2,
        "centring": "uniform",
        "fingerprint": "b",
        "values": {1: float64([[[5, 6]], [[7, 8]]])},
    }
    return StoredBasis(**{**parts, **changes})


def test_sizes() -> None:
    basis = stored_basis(biases=float64([[1, 2, 3], [4, 5, 6]]))
    assert (basis.layers, basis.columns, basis.heads, basis.centring) == (2, 3, 2, "uniform")


def test_constants() -> None:
    """Image 0 has μ = 1, σ = 0, image 1 has μ = 2, σ = 3: (10, 20) and (320, 640) besides the biases."""
    basis = stored_basis()
    mean, std = float64([1, 2]), float64([0, 3])
    assert torch.equal(basis.constants(mean, std, [1]), float64([[[13, 24]], [[323, 644]]]))
    assert torch.equal(basis.constants(mean, std, [1, 0])[0], float64([[13, 24], [11, 22]]))
    assert basis.constants(mean, std, []).shape == (2, 0, 2)


def test_texts_become_the_columns() -> None:
    """Towards (1, 1), (0, 1) and (2, 0)."""
    basis = stored_basis().towards(float64([[1, 1], [0, 1], [2, 0]]))
    assert torch.equal(basis.biases, float64([[3, 2, 2], [7, 4, 6]]))
    assert torch.equal(basis.mean_row, float64([30, 20, 20]))
    assert torch.equal(basis.std_row, float64([300, 200, 200]))
    assert torch.equal(basis.values(1), float64([[[11, 6, 10]], [[15, 8, 14]]]))
    assert (basis.columns, basis.heads, basis.centring, basis.fingerprint) == (3, 2, "uniform", "b")


def test_values_are_computed_once() -> None:
    basis = stored_basis().towards(float64([[1, 1]]))
    assert basis.values(1) is basis.values(1)


def test_a_layer_that_was_not_kept_is_refused() -> None:
    with pytest.raises(InputError, match=r"^layer 0 was not kept: the layers here are \[1\]$"):
        stored_basis().values(0)


def test_a_basis_of_its_own_tensors() -> None:
    basis = stored_basis()
    read = StoredBasis.of(basis.tensors([1]), [1], basis.header())
    for name in ("biases", "mean_row", "std_row"):
        assert torch.equal(getattr(read, name), getattr(basis, name))
    assert torch.equal(read.values(1), basis.values(1))
    assert (read.heads, read.centring, read.fingerprint) == (2, "uniform", "b")


def test_an_unknown_centring_is_refused() -> None:
    with pytest.raises(InputError, match=r"^centring is 'none': choose one of uniform, termwise$"):
        StoredBasis.of(stored_basis().tensors([1]), [1], stored_basis().header() | {"centring": "none"})


def test_another_dtype_is_made_once() -> None:
    basis = stored_basis()
    cpu = torch.device("cpu")
    assert basis.to(cpu, torch.float64) is basis
    moved = basis.to(cpu, torch.float32)
    assert moved is basis.to(cpu, torch.float32)
    assert moved is not basis
    for name in ("biases", "mean_row", "std_row"):
        assert torch.equal(getattr(moved, name), getattr(basis, name).float())
    assert torch.equal(moved.values(1), basis.values(1).float())
    assert (moved.heads, moved.centring, moved.fingerprint) == (2, "uniform", "b")


def test_the_device_counts_besides_the_dtype() -> None:
    basis = stored_basis()
    assert basis.to(torch.device("meta"), torch.float64).biases.device.type == "meta"
    assert basis.to(torch.device("cpu"), torch.float64) is basis


def test_the_same_weights_and_centring_are_the_same_basis() -> None:
    basis = stored_basis()
    assert basis.same_as(basis)
    assert basis.same_as(stored_basis())
    assert basis.same_as(basis.to(torch.device("cpu"), torch.float32))
    assert basis.to(torch.device("cpu"), torch.float32).same_as(basis)


@pytest.mark.parametrize(
    "change", [{"heads": 1}, {"heads": 3}, {"centring": "termwise"}, {"fingerprint": "a"}], ids=str
)
def test_other_weights_or_another_centring_are_another_basis(change: dict[str, Any]) -> None:
    basis, other = stored_basis(), stored_basis(**change)
    assert not basis.same_as(other)
    assert not other.same_as(basis)
    assert not basis.to(torch.device("cpu"), torch.float32).same_as(other)


def test_a_basis_of_changed_weights_is_only_the_same_as_itself() -> None:
    """Nothing says which weights they were: the fingerprint was not read in time."""

    def changed() -> str:
        raise InputError("the weights have changed")

    tower = wrap(vision_tower(layers=1)).tower
    one, other = fold(tower, "uniform", read_fingerprint=changed), fold(tower, "uniform", read_fingerprint=changed)
    assert one.same_as(one)
    assert one.same_as(one.to(torch.device("cpu"), torch.float64))
    assert not one.same_as(other)
    assert not one.same_as(fold(tower, "uniform"))
    assert not fold(tower, "uniform").same_as(one)


def test_the_fingerprint_is_read_once() -> None:
    reads = []

    def read() -> str:
        reads.append("read")
        return "c"

    basis = fold(wrap(vision_tower(layers=1)).tower, "uniform", read_fingerprint=read)
    assert not reads
    assert (basis.fingerprint, basis.fingerprint) == ("c", "c")
    assert reads == ["read"]


def test_a_basis_without_bytes_to_check() -> None:
    """On the meta device weights have shapes alone."""
    basis = fold(openclip.read(vision_tower(layers=1).to("meta")), "uniform")
    assert basis.values(0).shape == (2, 16, 20)


def test_values_made_in_inference_mode_can_be_used_outside() -> None:
    model = wrap(vision_tower(seed=1))
    with torch.inference_mode():
        values = [
            basis.values(0) for basis in (model.basis(), model.basis().towards(torch.ones(2, model.basis().columns)))
        ]
    assert not any(made.is_inference() for made in values)

"""Results are those of the arrays saved by version 0.1.0: to the bit on the machine that wrote them, else closely."""

import json
import sys

import numpy as np
import pytest
import torch
from builders import ROOT

SAVED = ROOT / "tests" / "saved"
sys.path.insert(0, str(SAVED))

import results  # noqa: E402

# Another CPU's instructions round differently: the norm of the difference over the norm of the saved array.
# The bundled model computes in float32: what is summed up in float64 from its codes is as close as these are.
CLOSE = {torch.int64: 0.0, torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def bar(name: str, dtype: torch.dtype) -> float:
    if "/bfloat16/" in name:
        return CLOSE[torch.bfloat16]
    return CLOSE[torch.float32 if name.startswith("scenes/") and dtype == torch.float64 else dtype]


@pytest.fixture(scope="module")
def made() -> dict[str, torch.Tensor]:
    return results.all_results()


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, str]]:
    return json.loads((SAVED / "digests.json").read_text(encoding="utf-8"))


def test_every_result_is_there(made: dict[str, torch.Tensor], written: dict[str, dict[str, str]]) -> None:
    same_isa = results.machine()["isa"] == written["machine"]["isa"]
    missing = set(written["digests"]) - set(made)
    assert {name for name in missing if same_isa or "-avx512" not in name} == set()
    assert len(written["digests"]) > 500


def test_bits_are_the_saved_ones(made: dict[str, torch.Tensor], written: dict[str, dict[str, str]]) -> None:
    if results.machine() != written["machine"]:
        pytest.skip(f"the arrays were saved on {written['machine']}, and this is {results.machine()}")
    wrong = [name for name, digest in written["digests"].items() if results.digest(made[name]) != digest]
    assert wrong == []


def test_values_are_close_to_the_saved_ones(made: dict[str, torch.Tensor]) -> None:
    with np.load(SAVED / "arrays.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    wrong = {}
    for name, expected in arrays.items():
        have = made[name]
        away = float((have.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
        if not away <= bar(name, have.dtype):
            wrong[name] = away
    assert wrong == {}

"""An operation is a folder, and a backend of one is a file in it: nothing else has to know."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import clipfast.kernels
from clipfast.kernels import dispatch, examples, ops, registration

OPERATION = '''
"""Twice a tensor."""

from torch import Tensor

from clipfast.kernels.registration import register


def doubled(x: Tensor, *, backend: str = "auto") -> Tensor:
    return _DOUBLED(x, backend)


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_DOUBLED = register("doubled", _fake, lambda examples: [examples.tokens])
'''
BACKEND = """
from clipfast.kernels.dispatch import Implementation

IMPLEMENTATIONS = {"doubled": Implementation(lambda x: FORMULA)}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside those of the package, with an eager backend."""
    made = tmp_path / "doubling"
    made.mkdir()
    (made / "__init__.py").write_text(OPERATION)
    (made / "eager.py").write_text(BACKEND.replace("FORMULA", "x * 2"))
    monkeypatch.setattr(clipfast.kernels, "__path__", [*clipfast.kernels.__path__, str(tmp_path)])
    yield made
    registration._OPERATIONS.pop("doubled", None)
    dispatch._PACKAGES.pop("doubled", None)
    dispatch.forget()
    for name in [name for name in sys.modules if name.startswith("clipfast.kernels.doubling")]:
        del sys.modules[name]
    vars(clipfast.kernels).pop("doubling", None)


def test_a_new_folder_is_an_operation(folder: Path) -> None:
    operation = registration.operations()["doubled"]
    (x,) = examples.arguments("doubled")
    assert torch.equal(operation(x, "auto"), 2 * x)
    assert dispatch.choose("doubled", [x]).backend == "eager"
    torch.library.opcheck(operation.op, (x, "auto"))


def test_a_new_file_is_a_backend_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "abacus.py").write_text(BACKEND.replace("FORMULA", "x + x"))
    monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.Backend("abacus"), dispatch.EAGER))
    operation = registration.operations()["doubled"]
    (x,) = examples.arguments("doubled")
    assert dispatch.choose("doubled", [x]).backend == "abacus"
    assert torch.equal(operation(x, "abacus"), 2 * x)
    assert f"{folder.name}.abacus" in " ".join(sys.modules)


def test_ops_has_every_operation() -> None:
    """Add a new one to ``kernels/ops.py``."""
    assert sorted(ops.__all__) == sorted(registration.operations())
    for name in ops.__all__:
        function = getattr(ops, name)
        assert function.__module__ == dispatch._PACKAGES[name]
        assert "backend: " in function.__doc__


def test_importing_the_operations_imports_neither_triton_nor_the_compiler() -> None:
    names = "('triton', 'torch._dynamo', 'clipfast.kernels.tuning')"
    script = f"import sys; from clipfast.kernels import ops; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""What operations on maps refuse: arguments that do not fit by name, what a backend cannot take with every reason."""

from typing import Any

import pytest
import torch
from contracting import DEVICES
from torch import Tensor

from clipfast.kernels import dispatch, ops

B, N, L, H, E, T, D = 2, 5, 3, 4, 8, 6, 7
DEVICE = DEVICES.get("triton", "cpu")


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, device=DEVICE, **options)


def layered(**changed: Any) -> Tensor:
    arguments = {
        "alpha": ones(B, L, H, N),
        "values": [ones(B, N, H, E) for _ in range(L)],
        "text_basis": ones(L, H, E, T),
        "heads": None,
    }
    return ops.layered_text_maps(**arguments | changed)


def one(backend: str = "auto", **changed: Any) -> Tensor:
    arguments = {"alpha": ones(B, H, N), "value": ones(B, N, H, E), "text_basis": ones(H, E, T)}
    return ops.text_maps(**arguments | {"out": torch.zeros(B, N, T, device=DEVICE)} | changed, backend=backend)


def test_arguments_that_fit_are_taken() -> None:
    assert float(layered(heads=torch.tensor([0, L * H - 1], device=DEVICE)).max()) == 2 * E
    assert float(one(heads=torch.tensor([3], device=DEVICE)).max()) == E


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": ones(B, L, H)}, r"alpha has shape \[2, 3, 4\], expected"),
        ({"text_basis": ones(L + 1, H, E, T)}, r"text_basis has shape \[4, 4, 8, 6\], expected \[3, 4, \?, \?\]"),
        ({"text_basis": ones(L, H, E)}, "text_basis has shape"),
        ({"values": [ones(B, N, H, E)] * 2}, "values are 2 layers, alpha has 3"),
        ({"values": [ones(B, N, H, E)] * 2 + [ones(B, N, H, E + 1)]}, r"values\[2\] has shape \[2, 5, 4, 9\]"),
        ({"values": [ones(B, N + 1, H, E)] * 3}, r"values\[0\] has shape"),
        ({"heads": ones(1, 2)}, r"heads has shape \[1, 2\], expected \[\?\]"),
        ({"heads": ones(2)}, "heads are torch.float32, expected torch.int64 or torch.int32"),
        ({"heads": ones(L * H).bool()}, "heads are torch.bool, expected"),
        ({"heads": ones(2).to(torch.uint8)}, "heads are torch.uint8, expected"),
    ],
)
def test_layers_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        layered(**changed)


@pytest.mark.parametrize("wrong", [[0, L * H], [-1]])
def test_heads_that_do_not_exist(wrong: list[int]) -> None:
    """Looked at only on the CPU."""
    with pytest.raises(ValueError, match=r"heads go from .* expected 0 to 11"):
        layered(heads=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"heads go from .* expected 0 to 3"):
        one(heads=torch.tensor(wrong))


def test_shift_and_scale_that_do_not_fit() -> None:
    given = ones(B, H, N), ones(B, N, H, E), ones(H, E, D)
    with pytest.raises(ValueError, match=r"^shift has shape \[2, 8\], expected \[2, 7\]"):
        ops.token_contributions(*given, ones(B, D + 1))
    with pytest.raises(ValueError, match=r"^scale has shape \[3\], expected \[2\]"):
        ops.token_contributions(*given, None, ones(B + 1))


# ------------------------------------------------------------------------------------------ what the kernels refuse


@pytest.fixture
def triton() -> str:
    refused = next(backend for backend in dispatch.BACKENDS if backend.name == "triton").unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))
    return "triton"


def test_every_reason_is_named(triton: str) -> None:
    wide = {"alpha": ones(B, H, N).double(), "value": ones(B, N, H, 160).double(), "text_basis": ones(H, 160, T)}
    with pytest.raises(dispatch.BackendUnavailable) as raised:
        one(triton, **wide, out=torch.zeros(B, N, T, device=DEVICE).double())
    for reason in ("value is float64", "alpha is float64", "out is float64", "head_dim 160"):
        assert reason in str(raised.value)


def test_heads_too_wide_for_a_tile(triton: str) -> None:
    alpha, value, matrix = ones(B, H, N), ones(B, N, H, 160), ones(H, 160, T)
    weight, out = ones(H, 160, 3), torch.zeros(B, N, T, device=DEVICE)
    calls = [
        lambda: ops.text_maps(alpha, value, matrix, out, backend=triton),
        lambda: ops.layered_text_maps(alpha[:, None], [value], matrix[None], backend=triton),
        lambda: ops.text_maps_from_tokens(alpha, ones(B, N, 3), weight, ones(H, 160), matrix, out, backend=triton),
        lambda: ops.head_maps(alpha, value, matrix, backend=triton),
        lambda: ops.token_contributions(alpha, value, matrix, backend=triton),
    ]
    for call in calls:
        with pytest.raises(dispatch.BackendUnavailable, match="head_dim 160 is more than 128"):
            call()
    assert not out.any()


def test_layers_of_several_dtypes(triton: str) -> None:
    values = [ones(B, N, H, E), ones(B, N, H, E).bfloat16(), ones(B, N, H, E)]
    with pytest.raises(dispatch.BackendUnavailable, match="values differ in dtype"):
        ops.layered_text_maps(ones(B, L, H, N), values, ones(L, H, E, T), backend=triton)

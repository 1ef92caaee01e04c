"""Arguments that do not fit are refused by name, before any backend sees them."""

from collections.abc import Callable

import pytest
import torch

from clipfast.kernels import ops

B, N, H, E, T, W = 2, 5, 3, 4, 6, 7
WEIGHTED = {"alpha": (B, H, N), "value": (B, N, H, E)}
ARGUMENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "attention": {"qkv": (B, N, 3, H, E)},
    "weighted_rows": {"qkv": (B, N, 3, H, E), "weights": (B, T, N)},
    "query_row_from_tokens": {
        "query": (B, H, E),
        "tokens": (B, N, W),
        "key_weight": (H, E, W),
        "value_weight": (H, E, W),
        "value_bias": (H, E),
    },
    "text_maps": {**WEIGHTED, "text_basis": (H, E, T), "out": (B, N, T)},
    "text_maps_from_tokens": {
        "alpha": (B, H, N),
        "tokens": (B, N, W),
        "value_weight": (H, E, W),
        "value_bias": (H, E),
        "text_basis": (H, E, T),
        "out": (B, N, T),
    },
    "head_maps": {**WEIGHTED, "text_basis": (H, E, T)},
    "token_contributions": {**WEIGHTED, "basis": (H, E, T)},
    "layer_statistics": {"residual": (B, W)},
}
FREE_AXES = {  # (operation, argument) → axes whose size nothing else fixes
    ("attention", "qkv"): (0, 1, 3, 4),
    ("weighted_rows", "qkv"): (3, 4),
    ("weighted_rows", "weights"): (1,),
    ("query_row_from_tokens", "query"): (),
    ("query_row_from_tokens", "tokens"): (1,),
    ("head_maps", "text_basis"): (2,),
    ("token_contributions", "basis"): (2,),
    ("layer_statistics", "residual"): (0, 1),
}
CASES = [(op, name) for op, arguments in ARGUMENTS.items() for name in arguments]


def call(op: str, shapes: dict[str, tuple[int, ...]]) -> object:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    function: Callable[..., object] = getattr(ops, op)
    return function(**tensors, **({"eps": 1e-5} if op == "layer_statistics" else {}))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_arguments_that_fit_are_taken(op: str) -> None:
    call(op, ARGUMENTS[op])


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_missing_axis_names_the_argument(op: str, name: str) -> None:
    shape = ARGUMENTS[op][name][1:]
    with pytest.raises(ValueError, match=rf"^{name} has shape \[{', '.join(map(str, shape))}\], expected \["):
        call(op, {**ARGUMENTS[op], name: shape})


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_wrong_size_is_refused(op: str, name: str) -> None:
    """Of two arguments that disagree either may be named; each is one of the operation's own."""
    shape = ARGUMENTS[op][name]
    for axis in range(len(shape)):
        if axis in FREE_AXES.get((op, name), ()):
            continue
        wrong = tuple(size + (i == axis) for i, size in enumerate(shape))
        with pytest.raises(ValueError, match=rf"^({'|'.join(ARGUMENTS[op])}) has shape \["):
            call(op, {**ARGUMENTS[op], name: wrong})


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match="row is 'last', expected 'cls', 'mean' or None"):
        ops.attention(torch.ones(B, N, 3, H, E), "last")


def test_wrong_arguments_of_rotate() -> None:
    x, table = torch.ones(B, N, 2, H, E), torch.ones(1, N, E)
    ops.rotate(x, table, table, True)
    cases = [
        ((x[0], table, table), r"^x has shape \[5, 2, 3, 4\], expected "),
        (
            (x[..., :3], table, table),
            r"^x has a head_dim of 3: pairs of entries are turned, so expected an even number$",
        ),
        ((x, table[0], table), r"^cos has shape \[5, 4\], expected \[3, 5, 4\]$"),
        ((x, table.repeat(2, 1, 1), table), r"^cos has shape \[2, 5, 4\], expected \[3, 5, 4\]$"),
        ((x, table[:, 1:], table), r"^cos has shape \[1, 4, 4\], expected \[1, 5, 4\]$"),
        ((x, table, table[..., 1:]), r"^sin has shape \[1, 5, 3\], expected \[1, 5, 4\]$"),
        ((x, table.repeat(3, 1, 1), table), r"^sin has shape \[1, 5, 4\], expected \[3, 5, 4\]$"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ops.rotate(*arguments, True)


def test_weights_are_in_the_precision_of_sums() -> None:
    qkv, weights = torch.ones(B, N, 3, H, E), torch.ones(B, 2, N)
    with pytest.raises(ValueError, match=r"^weights is torch.float64, expected torch.float32$"):
        ops.weighted_rows(qkv, weights.double())
    with pytest.raises(ValueError, match=r"^weights is torch.float32, expected torch.float64$"):
        ops.weighted_rows(qkv.double(), weights)
    with pytest.raises(ValueError, match=r"^weights is torch.bfloat16, expected torch.float32$"):
        ops.weighted_rows(qkv.bfloat16(), weights.bfloat16())
    with pytest.raises(ValueError, match=r"^qkv is torch.int64, expected floats$"):
        ops.weighted_rows(qkv.long(), weights)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_unknown_backend_is_refused(op: str) -> None:
    tensors = {name: torch.ones(shape) for name, shape in ARGUMENTS[op].items()}
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        getattr(ops, op)(**tensors, **({"eps": 1e-5} if op == "layer_statistics" else {}), backend="abacus")

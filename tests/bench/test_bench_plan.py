"""Plans: combinations, order, and invalid plans."""

import pytest

from clipfast.bench.outputs import OUTPUTS
from clipfast.bench.plan import Plan, Setup, parse_outputs
from clipfast.errors import ClipfastError, InputError, ModelError


def test_setups_are_unique_and_grouped_by_weights() -> None:
    plan = Plan(models=("a", "b"), dtypes=("fp32", "bf16"), backends=("auto", "eager"), batches=(1, 8))
    setups = list(plan.setups())
    assert len(setups) == len(set(setups)) == 16
    weights = [(setup.model, setup.dtype) for setup in setups]
    assert weights == sorted(weights, key=weights.index)
    assert str(Setup("ViT-B-32", "fp32", "auto", 8)) == "ViT-B-32, batch 8, fp32, auto"


@pytest.mark.parametrize(
    ("outputs", "options", "rows"),
    [
        (OUTPUTS, {}, [*OUTPUTS]),
        (("plain",), {"naive": True}, ["plain"]),  # no decomposition to compare it with
        (("heads",), {"naive": True}, ["heads", "naive heads"]),
        (("maps", "tokens"), {"naive": True, "compiled": True}, ["maps", "tokens", "plain compiled", "naive tokens"]),
        (OUTPUTS, {"naive": True}, [*OUTPUTS, "naive heads", "naive tokens"]),
    ],
)
def test_rows_of_a_combination(outputs: tuple[str, ...], options: dict[str, bool], rows: list[str]) -> None:
    assert Plan(outputs=outputs, **options).rows() == rows


def test_outputs_with_commas_or_repeated() -> None:
    assert parse_outputs([]) == OUTPUTS
    assert parse_outputs(["tokens,plain", "heads"]) == ("plain", "heads", "tokens")
    assert parse_outputs(["maps", "maps, maps"]) == ("maps",)
    assert parse_outputs(["heads,tails"]) == ("heads", "tails")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ("heads", "tails")}, "--outputs does not know 'tails': choose from plain, heads"),
        ({"outputs": ()}, "--outputs is empty"),
        ({"dtypes": ("int8",)}, "--dtype does not know 'int8': choose from fp32"),
        ({"batches": (8, 0)}, "--batch is 0"),
        ({"texts": 0}, "--texts is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"pairs": 0}, "--pairs is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"device": "mps"}, "mps cannot be measured"),
        ({"backends": ("auto", "abacus")}, "unknown backend 'abacus'"),
        ({"models": ("scenes", "ViT-B-23")}, "no model is called 'ViT-B-23'"),
        ({"models": ("hf:a/b",)}, "hf:a/b is a model of transformers, and only models of open_clip are measured"),
        ({"models": ("timm:vit_tiny",)}, "timm:vit_tiny is a model of timm, and only models of open_clip are measured"),
        ({"models": ("local-dir:/nowhere",)}, "holds no open_clip_config.json"),
    ],
)
def test_invalid_plan_is_one_line(changes: dict[str, object], message: str) -> None:
    settings = {"models": ("scenes",), **changes}
    with pytest.raises((InputError, ModelError)) as caught:
        Plan(**settings).check()  # type: ignore[arg-type]
    assert isinstance(caught.value, ClipfastError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_valid_plan() -> None:
    Plan(models=("scenes", "ViT-B-32", "RN50"), dtypes=("fp16", "fp64"), backends=("auto", "eager"), warmup=0).check()

"""The checks of ``clipfast bench``: correct results pass in every precision, wrong results fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import FLOAT64, SUM_BFLOAT16, SUM_FLOAT32

from clipfast.bench import checks
from clipfast.bench.checks import BOUNDS, Gate
from clipfast.bench.inputs import DTYPES, module
from clipfast.bench.outputs import NAIVE_HEADS, NAIVE_TOKENS, OUTPUTS, Case, call, each_token

ALL = (*OUTPUTS, NAIVE_HEADS, NAIVE_TOKENS)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(module("scenes"), 3, backend="eager", texts=4)


@pytest.fixture(scope="module")
def gate(case: Case) -> Gate:
    return Gate(case)


def failed_checks(gate: Gate, output: str, subject: Callable[..., Any]) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in gate.verify(output, subject) if not check.passed]


def test_bounds_equal_those_of_the_tests() -> None:
    assert {BOUNDS[torch.bfloat16], BOUNDS[torch.float16]} == {SUM_BFLOAT16}
    assert BOUNDS[torch.float32] == SUM_FLOAT32
    assert BOUNDS[torch.float64] == FLOAT64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_correct_results_pass_in_every_precision(dtype: str) -> None:
    case = Case.of(module("scenes", dtype=DTYPES[dtype]), 3, backend="eager", texts=4)
    gate = Gate(case)
    for output in ALL:
        results = gate.verify(output, call(case, output))
        assert [check for check in results if not check.passed] == []
        assert any("float64" in check.name for check in results)
        definition = {check.name for check in results if check.name.endswith("the definition's")}
        assert {check.bound for check in results if check.name not in definition} == {BOUNDS[DTYPES[dtype]]}
        assert {check.bound for check in results if check.name in definition} <= {FLOAT64}
        assert bool(definition) is (output in OUTPUTS and output != "plain")


def test_wrong_embeddings_fail(case: Case, gate: Gate) -> None:
    embedding = call(case, "plain")()
    assert isinstance(embedding, torch.Tensor)
    for wrong in (embedding.roll(1, 0), embedding + 1e-3 * embedding.norm(), embedding * float("nan"), embedding[:2]):
        assert failed_checks(gate, "plain compiled", lambda wrong=wrong: wrong)
    assert not failed_checks(gate, "plain compiled", lambda: embedding)


def test_wrong_or_permuted_heads_fail(case: Case, gate: Gate) -> None:
    results, heads = call(case, "heads")()  # type: ignore[misc]
    name = "sum of all terms against the plain forward's embedding"
    assert name in failed_checks(gate, "heads", lambda: (results, heads * 1.01))
    # permuted heads keep every sum; only the comparison with float64 fails
    assert failed_checks(gate, "heads", lambda: (results, heads.roll(1, 2))) == ["heads against float64"]
    assert failed_checks(gate, "heads", lambda: (results, heads.roll(1, 1))) == ["heads against float64"]
    assert "max_error()" in failed_checks(gate, "heads", lambda: (replace(results, codes=results.codes * 1.01), heads))
    assert failed_checks(gate, "heads", lambda: (results, heads * float("nan")))


def test_wrong_or_permuted_attention_and_maps_fail(case: Case, gate: Gate) -> None:
    results, heads = call(case, "maps")()  # type: ignore[misc]
    rolled = replace(results, _attention=results.attention.roll(1, -1))
    assert failed_checks(gate, "attention", lambda: (rolled, heads)) == ["attention against float64"]
    scaled = replace(results, _attention=results.attention * 1.01)
    assert "rows of attention against 1" in failed_checks(gate, "attention", lambda: (scaled, heads))
    moved = replace(results, _maps=results.maps.roll(1, 1))
    assert failed_checks(gate, "maps", lambda: (moved, heads)) == ["maps against float64"]
    scaled = replace(results, _maps=results.maps * 1.01)
    assert "maps summed over tokens against the heads' scores" in failed_checks(gate, "maps", lambda: (scaled, heads))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda tokens: tokens.roll(1, 1), "tokens against float64"),
        (lambda tokens: tokens * 1.01, "tokens summed against the heads"),
        (lambda tokens: tokens * float("nan"), "tokens against float64"),
    ],
)
def test_wrong_tokens_fail(case: Case, gate: Gate, wrong: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    def subject(take: Any) -> Any:
        return each_token(case.model, case.images, lambda layer, tokens: take(layer, wrong(tokens)))

    assert name in failed_checks(gate, "tokens", subject)


def test_wrong_naive_result_fails(case: Case, gate: Gate) -> None:
    result: Any = call(case, NAIVE_HEADS)()
    assert failed_checks(gate, NAIVE_HEADS, lambda: replace(result, attentions=result.attentions * 1.01))
    permuted = replace(result, attentions=result.attentions.roll(1, 2))
    assert failed_checks(gate, NAIVE_HEADS, lambda: permuted) == ["naive heads against float64"]


def test_tokens_of_the_definition_are_skipped_if_large(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float64 tokens against the definition's" in names(Gate(case), case, "tokens")
    monkeypatch.setattr(checks, "CHEAP_TERMS", 10)
    assert "float64 tokens against the definition's" not in names(Gate(case), case, "tokens")
    assert "float64 heads against the definition's" in names(Gate(case), case, "heads")


def names(gate: Gate, case: Case, output: str) -> list[str]:
    return [check.name for check in gate.verify(output, call(case, output))]


def test_float64_checks_are_skipped_for_a_large_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHEAP", 10)
    results = Gate(case).verify("maps", call(case, "maps"))
    assert not any("float64" in check.name for check in results)
    assert all(check.passed for check in results)

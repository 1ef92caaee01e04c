"""Measuring for real, on the bundled model: what an entry holds, and what happens to what cannot be measured."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import clipfast
from clipfast.bench import outputs, run
from clipfast.bench.document import Row
from clipfast.bench.measuring import quantiles
from clipfast.bench.outputs import OUTPUTS
from clipfast.bench.plan import Plan
from clipfast.bench.run import EVERY, WRONG, measure_plan

PLAN = Plan(models=("scenes",), batches=(2,), texts=3, pairs=2, warmup=0, memory=False)


def measured(**changes: Any) -> dict[str, dict[str, Any]]:
    """Entries by output."""
    return {entry["output"]: entry for entry in measure_plan(replace(PLAN, **changes))}


def is_not_timed(entry: dict[str, Any]) -> bool:
    """Whether an entry holds no speed anywhere."""
    return not {"milliseconds", "images_per_second", "against", "seconds", "memory"} & set(entry)


def test_every_output_is_timed_against_plain_and_its_pairs_are_kept() -> None:
    found = measured()
    assert list(found) == list(OUTPUTS)
    for output, entry in found.items():
        assert (entry["model"], entry["batch"], entry["dtype"], entry["backend"]) == ("scenes", 2, "fp32", "auto")
        assert entry["failed"] is None
        assert entry["memory"] is None
        timing = entry["against"]["plain"]
        assert (timing["a"]["name"], timing["b"]["name"], timing["pairs"]) == (output, "plain", 2)
        assert timing["a"]["seconds"] == quantiles(timing["a"]["all"])
        pairs = zip(timing["a"]["all"], timing["b"]["all"], strict=True)
        assert timing["ratio_b_over_a"]["all"] == [b / a for a, b in pairs]
        assert entry["milliseconds"] == timing["a"]["seconds"]["median"] * 1e3
        assert entry["images_per_second"] == pytest.approx(2e3 / entry["milliseconds"])
        assert entry["checks"]
        assert entry["largest_error"] == max(check["error"] for check in entry["checks"])
        assert all(check["error"] <= check["bound"] for check in entry["checks"])
        json.dumps(entry, allow_nan=False)
        assert Row.of(entry).failed is None


def test_baselines_are_paired_with_the_outputs_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda visual, dynamic: visual.forward)  # the compiler takes a minute
    found = measured(naive=True, compiled=True, pairs=1)
    baselines = {output: list(entry["against"]) for output, entry in found.items()}
    assert baselines == {
        "plain": ["plain"],
        "heads": ["plain", "plain compiled", "naive heads"],
        "attention": ["plain", "plain compiled", "naive heads"],
        "maps": ["plain", "plain compiled", "naive tokens"],
        "tokens": ["plain", "plain compiled", "naive tokens"],
        "plain compiled": ["plain"],
        "naive heads": ["plain"],
        "naive tokens": ["plain"],
    }


def test_memory_is_that_of_a_fresh_process_that_computes_the_same() -> None:
    found = measured(outputs=("plain", "tokens"), memory=True, pairs=1)
    for entry in found.values():
        memory = entry["memory"]
        assert memory["of"] == "process"
        assert memory["shown_mb"] == memory["peak_mb"] >= memory["loaded_mb"] * 0.99 > 100
        assert Row.of(entry).memory_mb == memory["peak_mb"]


def test_a_process_that_dies_leaves_the_speed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def died(*_: object, **__: object) -> None:
        raise run.ProbeFailed("it ended\nwith -9")

    monkeypatch.setattr(run, "peak_memory", died)
    (entry,) = measured(outputs=("plain",), memory=True, pairs=1).values()
    assert entry["images_per_second"] > 0
    assert entry["memory"] == {"shown_mb": None, "of": "process", "failed": "it ended with -9"}


# ------------------------------------------------------------------------------------------------------- the gate


def test_a_wrong_output_has_no_speed_and_the_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    right = outputs.explain

    def wrong(*given: Any) -> Any:
        found, heads = right(*given)
        return found, heads * 1.001

    monkeypatch.setattr(outputs, "explain", wrong)
    found = measured(pairs=1)
    entry = found.pop("maps")
    assert is_not_timed(entry)
    assert entry["failed"]["kind"] == WRONG
    assert entry["failed"]["reason"].startswith("not timed: ")
    assert any(check["error"] > check["bound"] for check in entry["checks"])
    assert all(other["failed"] is None for other in found.values())
    assert "not timed" in (Row.of(entry).failed or "")


@pytest.mark.parametrize("wrong", [lambda tokens: tokens.roll(1, 1), lambda tokens: tokens * 1.01])
def test_tokens_that_are_wrong_inside_the_library_are_not_timed(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = clipfast.Contributions.tokens
    # the float64 that outputs are compared with is wrong too: only the definition written out knows better
    monkeypatch.setattr(clipfast.Contributions, "tokens", lambda self, layer: wrong(right(self, layer)))
    found = measured(outputs=("heads", "tokens"), pairs=1)
    assert found["heads"]["failed"] is None
    assert found["tokens"]["failed"]["kind"] == WRONG
    assert "float64 tokens against the definition's" in found["tokens"]["failed"]["reason"]
    assert is_not_timed(found["tokens"])


def test_a_wrong_compiler_is_not_timed_and_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda visual, dynamic: lambda images: visual(images).roll(1, 0))
    found = measured(outputs=("heads",), compiled=True, pairs=1)
    assert found["plain compiled"]["failed"]["kind"] == WRONG
    assert is_not_timed(found["plain compiled"])
    assert list(found["heads"]["against"]) == ["plain"]


def test_an_embedding_that_is_not_finite_is_wrong_and_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    right = outputs.noise
    monkeypatch.setattr(outputs, "noise", lambda *given, **more: right(*given, **more) * float("nan"))
    found = measured()
    assert {entry["failed"]["kind"] for entry in found.values()} == {WRONG}
    json.dumps(list(found.values()), allow_nan=False)


# ---------------------------------------------------------------------------------- what cannot be measured at all


def test_a_refused_model_is_one_entry_per_combination_and_the_rest_goes_on() -> None:
    plan = replace(PLAN, models=("RN50", "scenes"), batches=(1, 2), outputs=("heads",), pairs=1)
    found = list(measure_plan(plan))
    assert [(entry["model"], entry["batch"], entry["output"]) for entry in found] == [
        ("RN50", 1, EVERY),
        ("RN50", 2, EVERY),
        ("scenes", 1, "heads"),
        ("scenes", 2, "heads"),
    ]
    assert found[0]["failed"]["kind"] == "refused"
    assert "ModifiedResNet" in found[0]["failed"]["reason"]
    assert is_not_timed(found[0])
    assert [entry["failed"] for entry in found[2:]] == [None, None]


def test_running_out_of_memory_is_an_entry_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "with_attention", lambda model, images: torch.empty(1 << 60))
    found = measured(pairs=1)
    entry = found.pop("attention")
    assert entry["failed"] == {"kind": "out of memory", "reason": "try a smaller --batch"}
    assert is_not_timed(entry)
    assert all(other["failed"] is None for other in found.values())


def test_running_out_of_memory_while_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    right = outputs.heads_only

    def later(*given: Any) -> Any:
        calls.append(1)
        return right(*given) if len(calls) == 1 else torch.empty(1 << 60)  # the gate is the first

    monkeypatch.setattr(outputs, "heads_only", later)
    found = measured(outputs=("heads", "attention"), pairs=1)
    assert found["heads"]["failed"]["kind"] == "out of memory"
    assert is_not_timed(found["heads"])
    assert found["attention"]["failed"] is None


def test_without_a_plain_forward_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr("clipfast.bench.checks.plain", no_kernel)
    found = list(measure_plan(replace(PLAN, batches=(1, 2))))
    assert [entry["output"] for entry in found] == [EVERY, EVERY]
    assert {entry["failed"]["kind"] for entry in found} == {"cannot run"}
    assert "not implemented for 'Half'" in found[0]["failed"]["reason"]


def test_whatever_a_compiler_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise OSError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measured(outputs=("plain",), compiled=True, pairs=1)
    reason = {"kind": "cannot run", "reason": "OSError: no C++ compiler was found"}
    assert found["plain compiled"]["failed"] == reason
    assert found["plain"]["failed"] is None


def test_a_naive_form_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "naive_refusals", lambda case: ["it pools patches"])
    found = measured(outputs=("heads",), naive=True, pairs=1)
    assert found["naive heads"]["failed"] == {"kind": "refused", "reason": "it pools patches"}
    assert list(found["heads"]["against"]) == ["plain"]


def test_a_fault_of_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(outputs, "heads_only", fault)
    with pytest.raises(KeyError):
        measured()


def test_settings_of_torch_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    threads = torch.get_num_threads()
    running = measure_plan(replace(PLAN, threads=threads + 1, outputs=("plain",), pairs=1))
    entry = next(running)
    assert entry["torch_threads"] == threads + 1
    assert torch.backends.cudnn.allow_tf32 is False
    running.close()  # type: ignore[attr-defined]
    assert torch.backends.cudnn.allow_tf32 is True
    assert torch.get_num_threads() == threads

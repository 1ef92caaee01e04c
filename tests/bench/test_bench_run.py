"""Runs of the bundled model: contents of an entry, and cases that fail."""

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
    """Whether an entry has no timings."""
    return not {"milliseconds", "images_per_second", "against", "seconds", "memory"} & set(entry)


@pytest.mark.slow
def test_every_output_is_timed_against_plain() -> None:
    entries = measured()
    assert list(entries) == list(OUTPUTS)
    for output, entry in entries.items():
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


@pytest.mark.slow
def test_outputs_are_timed_against_their_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda visual, dynamic: visual.forward)  # the compiler takes a minute
    entries = measured(naive=True, compiled=True, pairs=1)
    baselines = {output: list(entry["against"]) for output, entry in entries.items()}
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


@pytest.mark.slow
def test_memory_is_that_of_a_new_process() -> None:
    entries = measured(outputs=("plain", "tokens"), memory=True, pairs=1)
    for entry in entries.values():
        memory = entry["memory"]
        assert memory["of"] == "process"
        assert memory["shown_mb"] == memory["peak_mb"] >= memory["loaded_mb"] * 0.99 > 100
        assert Row.of(entry).memory_mb == memory["peak_mb"]


def test_failed_memory_process_keeps_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise run.ProbeFailed("it ended\nwith -9")

    monkeypatch.setattr(run, "peak_memory", fail)
    (entry,) = measured(outputs=("plain",), memory=True, pairs=1).values()
    assert entry["images_per_second"] > 0
    assert entry["memory"] == {"shown_mb": None, "of": "process", "failed": "it ended with -9"}


# ----------------------------------------------------------------------------------------------------- the checks


def test_wrong_output_is_not_timed_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    original = outputs.explain

    def wrong(*arguments: Any) -> Any:
        contributions, heads = original(*arguments)
        return contributions, heads * 1.001

    monkeypatch.setattr(outputs, "explain", wrong)
    entries = measured(pairs=1)
    entry = entries.pop("maps")
    assert is_not_timed(entry)
    assert entry["failed"]["kind"] == WRONG
    assert entry["failed"]["reason"].startswith("not timed: ")
    assert any(check["error"] > check["bound"] for check in entry["checks"])
    assert all(other["failed"] is None for other in entries.values())
    assert "not timed" in (Row.of(entry).failed or "")


@pytest.mark.parametrize("wrong", [lambda tokens: tokens.roll(1, 1), lambda tokens: tokens * 1.01])
@pytest.mark.slow
def test_wrong_tokens_are_not_timed(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = clipfast.Contributions.tokens
    # the float64 decomposition is wrong as well; only the naive definition shows it
    monkeypatch.setattr(clipfast.Contributions, "tokens", lambda self, layer: wrong(original(self, layer)))
    entries = measured(outputs=("heads", "tokens"), pairs=1)
    assert entries["heads"]["failed"] is None
    assert entries["tokens"]["failed"]["kind"] == WRONG
    assert "float64 tokens against the definition's" in entries["tokens"]["failed"]["reason"]
    assert is_not_timed(entries["tokens"])


def test_wrong_compiled_forward_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda visual, dynamic: lambda images: visual(images).roll(1, 0))
    entries = measured(outputs=("heads",), compiled=True, pairs=1)
    assert entries["plain compiled"]["failed"]["kind"] == WRONG
    assert is_not_timed(entries["plain compiled"])
    assert list(entries["heads"]["against"]) == ["plain"]


@pytest.mark.slow
def test_embedding_with_nan_is_wrong_and_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    original = outputs.noise
    monkeypatch.setattr(outputs, "noise", lambda *arguments, **options: original(*arguments, **options) * float("nan"))
    entries = measured()
    assert {entry["failed"]["kind"] for entry in entries.values()} == {WRONG}
    json.dumps(list(entries.values()), allow_nan=False)


# ------------------------------------------------------------------------------------ cases that cannot be measured


def test_unsupported_model_is_one_entry_per_combination() -> None:
    plan = replace(PLAN, models=("convnext_large_d", "scenes"), batches=(1, 2), outputs=("heads",), pairs=1)
    entries = list(measure_plan(plan))
    assert [(entry["model"], entry["batch"], entry["output"]) for entry in entries] == [
        ("convnext_large_d", 1, EVERY),
        ("convnext_large_d", 2, EVERY),
        ("scenes", 1, "heads"),
        ("scenes", 2, "heads"),
    ]
    assert entries[0]["failed"]["kind"] == "refused"
    assert "nonlinear projection" in entries[0]["failed"]["reason"]
    assert is_not_timed(entries[0])
    assert [entry["failed"] for entry in entries[2:]] == [None, None]


@pytest.mark.slow
def test_running_out_of_memory_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "with_attention", lambda model, images: torch.empty(1 << 60))
    entries = measured(pairs=1)
    entry = entries.pop("attention")
    assert entry["failed"] == {"kind": "out of memory", "reason": "try a smaller --batch"}
    assert is_not_timed(entry)
    assert all(other["failed"] is None for other in entries.values())


def test_running_out_of_memory_while_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = outputs.heads_only

    def fail_later(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments) if len(calls) == 1 else torch.empty(1 << 60)  # the first call is the check

    monkeypatch.setattr(outputs, "heads_only", fail_later)
    entries = measured(outputs=("heads", "attention"), pairs=1)
    assert entries["heads"]["failed"]["kind"] == "out of memory"
    assert is_not_timed(entries["heads"])
    assert entries["attention"]["failed"] is None


def test_failing_plain_forward_stops_the_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr("clipfast.bench.checks.plain", no_kernel)
    entries = list(measure_plan(replace(PLAN, batches=(1, 2))))
    assert [entry["output"] for entry in entries] == [EVERY, EVERY]
    assert {entry["failed"]["kind"] for entry in entries} == {"cannot run"}
    assert "not implemented for 'Half'" in entries[0]["failed"]["reason"]


def test_error_of_the_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise OSError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    entries = measured(outputs=("plain",), compiled=True, pairs=1)
    reason = {"kind": "cannot run", "reason": "OSError: no C++ compiler was found"}
    assert entries["plain compiled"]["failed"] == reason
    assert entries["plain"]["failed"] is None


def test_unsupported_naive_baseline_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "naive_refusals", lambda case: ["it pools patches"])
    entries = measured(outputs=("heads",), naive=True, pairs=1)
    assert entries["naive heads"]["failed"] == {"kind": "refused", "reason": "it pools patches"}
    assert list(entries["heads"]["against"]) == ["plain"]


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(outputs, "heads_only", fault)
    with pytest.raises(KeyError):
        measured()


def test_torch_settings_are_restored() -> None:
    convolutions = torch.backends.cudnn.conv
    before, threads = convolutions.fp32_precision, torch.get_num_threads()
    convolutions.fp32_precision = "tf32"
    try:
        running = measure_plan(replace(PLAN, threads=threads + 1, outputs=("plain",), pairs=1))
        entry = next(running)
        assert entry["torch_threads"] == threads + 1
        assert convolutions.fp32_precision == "ieee"
        running.close()  # type: ignore[attr-defined]
        assert convolutions.fp32_precision == "tf32"
        assert torch.get_num_threads() == threads
    finally:
        convolutions.fp32_precision = before

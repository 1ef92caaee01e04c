"""The self-test passes for every kind of model, and notices kernels that return slightly wrong numbers."""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import clip_model, vision_tower
from huggingface_models import VISION
from PIL import Image

import clipfast
from clipfast import InputError, Model, wrap
from clipfast.commands.doctor.command import run
from clipfast.commands.doctor.options import Options
from clipfast.kernels import dispatch
from clipfast.selftest import SelfTest, example_images, selftest


def siglip() -> Model:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**VISION)
    return wrap(transformers.SiglipVisionModel(config).eval(), backend="eager")


MODELS = {
    "class token": lambda: wrap(clip_model(), backend="eager"),
    "mean": lambda: wrap(vision_tower(pool_type="avg", final_ln_after_pool=True), backend="eager"),
    "float64": lambda: wrap(vision_tower(dtype=torch.float64), backend="eager"),
    "bfloat16": lambda: wrap(vision_tower(dtype=torch.bfloat16), backend="eager"),
    "attention pool": siglip,
    "auto": lambda: wrap(vision_tower()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_model_passes(name: str) -> None:
    model = MODELS[name]()
    found = selftest(model)
    assert found.ok, str(found)
    assert found.images == 4
    assert all(0 <= check.error < check.bound for check in found.checks)
    depths = {check.what.partition(", depth=")[2] for check in found.checks[1:]}
    two = {"'all'", "'pool'"}
    assert depths == (two if name in ("mean", "attention pool") else {""})


def test_images_are_the_same_at_every_call_and_differ() -> None:
    first, second = (example_images(24, 32) for _ in range(2))
    assert [image.size for image in first] == [(32, 24)] * 4
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert len({image.tobytes() for image in first}) == 4


def test_images_of_the_user_are_added() -> None:
    model = wrap(vision_tower())
    assert selftest(model, [Image.new("RGB", (50, 40), "red")]).images == 5
    assert selftest(model, torch.randn(2, 3, 24, 24)).images == 6


# ------------------------------------------------------------------------------------------------------------- faults

SUM, OWN = "sum of all terms = embedding", "embedding and every layer = those of the module's own forward"
MAP, MAPS, HEAD = (
    "map of a text = score of the heads",
    "map per head, summed = map",
    "map of a head = score of the head",
)
ATTENTION, TOKENS = "attention of each head sums to 1", "tokens of a head = the head"

FAULTS: dict[str, tuple[str, str, set[str]]] = {
    # folder, operation → the checks that must fail when its results are too large by one in a thousand
    "attention": ("attention", "attention", {OWN, ATTENTION}),
    "query_row": ("query_row", "query_row_from_tokens", {OWN, ATTENTION}),
    "norm": ("layer_norm", "add_layer_norm", {OWN}),
    "linear": ("linear", "linear", {OWN}),
    "mlp": ("linear", "linear_activation", {OWN}),
    "text_maps": ("text_maps", "text_maps", {MAP, MAPS}),
    "head_maps": ("token_contributions", "head_maps", {HEAD, MAPS}),
    "token_contributions": ("token_contributions", "token_contributions", {TOKENS}),
}


def too_large(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(too_large(part) for part in result)
    return result * 1.001 if isinstance(result, torch.Tensor) else result


@pytest.fixture
def break_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def break_it(folder: str, operation: str, change: Callable[[Any], Any] = too_large) -> list[int]:
        """Changes an operation's results; returns a list that counts its calls."""
        calls: list[int] = []
        module = importlib.import_module(f"clipfast.kernels.{folder}.eager")
        original = module.IMPLEMENTATIONS[operation]

        def wrong(*arguments: Any) -> Any:
            calls.append(1)
            result = original.run(*arguments)
            if result is None:  # sums that are added to an argument
                arguments[3].mul_(1.001)
            return change(result)

        monkeypatch.setitem(module.IMPLEMENTATIONS, operation, replace(original, run=wrong))
        dispatch.forget()
        return calls

    yield break_it
    monkeypatch.undo()
    dispatch.forget()


def failed(found: SelfTest) -> set[str]:
    return {check.what for check in found.checks if not check.ok}


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_is_slightly_wrong_is_caught(name: str, break_kernel: Any) -> None:
    folder, operation, expected = FAULTS[name]
    model = wrap(vision_tower(), backend="eager")
    assert selftest(model).ok
    calls = break_kernel(folder, operation)
    found = selftest(wrap(model.module, backend="eager"))
    assert calls, "this operation does not run"
    assert not found.ok
    assert expected <= failed(found), str(found)


def test_attention_of_other_tokens_is_caught(break_kernel: Any) -> None:
    """Weights that sum to 1 and belong to the neighbours: the embedding does not depend on them, maps do."""
    for folder, operation in (("attention", "attention"), ("query_row", "query_row_from_tokens")):
        break_kernel(folder, operation, lambda result: (result[0], result[1].roll(1, -1)))
    assert failed(selftest(wrap(vision_tower(), backend="eager"))) == {MAP, HEAD, TOKENS}


def test_the_part_that_differs_is_named(break_kernel: Any) -> None:
    break_kernel("linear", "linear_activation")
    (own, *_) = selftest(wrap(vision_tower(), backend="eager")).checks
    assert (own.what, own.ok) == (OWN, False)
    assert own.where.startswith("first at the layer 0, ")
    assert f"FAILED: {own.where}" in str(selftest(wrap(vision_tower(), backend="eager")))


def test_results_that_are_not_numbers_fail() -> None:
    visual = vision_tower()
    with torch.no_grad():
        visual.conv1.weight[0, 0, 0, 0] = torch.nan
    found = selftest(wrap(visual))
    assert failed(found) >= {SUM, OWN, MAP}


# -------------------------------------------------------------------------------------------------- the command line


def test_the_command_tests_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    assert run(Options("scenes", [tmp_path / "a.png"], device="cpu", json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["images"] == 5
    assert {check["what"] for check in report["checks"]} == {SUM, OWN, MAP, MAPS, HEAD, ATTENTION, TOKENS}
    assert all(check["ok"] and 0 <= check["error"] <= check["bound"] for check in report["checks"])
    assert run(Options("scenes", device="cpu", dtype="bf16")) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["# check", "difference", "at most", "result"]
    assert {row[3] for row in rows[1:]} == {"ok"}


def test_the_command_exits_with_1_where_a_check_fails(break_kernel: Any, capsys: pytest.CaptureFixture[str]) -> None:
    break_kernel("text_maps", "text_maps")
    assert run(Options("scenes", device="cpu", backend="eager")) == 1
    captured = capsys.readouterr()
    results = {line.split("\t")[0]: line.split("\t")[3] for line in captured.out.splitlines()[1:]}
    assert results[MAP] == results[MAPS] == "FAILED"
    assert results[SUM] == results[OWN] == "ok"
    assert "2 of 7 checks failed: results of this model are wrong here" in captured.err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (Options(pretrained="openai"), InputError, "--pretrained is for testing a model"),
        (Options(dtype="bf16"), InputError, "--dtype is for testing a model"),
        (Options(backend="eager"), InputError, "--backend is for testing a model"),
        (Options("no-such-model"), clipfast.ModelError, "no model is called"),
        (Options("scenes", backend="fast"), InputError, "fast"),
        (Options("scenes", device="nowhere"), InputError, "no device is called"),
        (Options("scenes", [Path("gone.png")]), clipfast.ImageError, "gone.png: no such file"),
    ],
)
def test_bad_input_is_refused(options: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(options)

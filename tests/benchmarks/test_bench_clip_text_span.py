"""The benchmark of the logger compares arrays before times, and reports what it measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pixels, vision_tower

from benchmarks import clip_text_span as benchmark
from clipfast.bench import naive
from clipfast.bench.measuring import WrongResult


@pytest.mark.parametrize("spatial", [True, False])
def test_both_sides_agree(spatial: bool) -> None:
    visual = vision_tower()
    model, images = benchmark.Clip(visual), pixels(visual)
    setup = benchmark.Setup("tiny", 2, spatial, None)
    comparison, memory = benchmark.measure(model, images, setup, 2, 1, None)
    assert len(comparison.ratios) == 2
    assert {check.name for check in comparison.checks} == {"attention's terms", "start and MLPs", "embedding"}
    assert memory is None
    assert "encode_image" not in vars(model)


def test_nothing_is_timed_where_arrays_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    visual = vision_tower()
    decompose = naive.decompose

    def wrong(*arguments: Any, **options: Any) -> naive.Result:
        result = decompose(*arguments, **options)
        return replace(result, attentions=result.attentions * 1.01)

    monkeypatch.setattr(naive, "decompose", wrong)
    setup = benchmark.Setup("tiny", 2, True, None)
    with pytest.raises(WrongResult, match="attention's terms"):
        benchmark.measure(benchmark.Clip(visual), pixels(visual), setup, 1, 1, None)


def test_the_cases_have_the_bars_of_the_project() -> None:
    bars = {setup.name: setup.faster for setup in benchmark.SETUPS}
    assert bars == {"ViT-B-32 tokens": 10, "ViT-B-32 heads": None, "ViT-B-16 tokens": 45}
    assert benchmark.SMALLER == 0.5


def test_an_unknown_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--only", "ViT-X", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "the cases are ViT-B-32 tokens" in capsys.readouterr().err


def test_a_call_that_a_new_process_can_build() -> None:
    torch.manual_seed(0)
    result: Any = benchmark.logger_call("ViT-B-32", 1, 1, False)()
    assert result.attentions.shape == (1, 12, 12, 512)

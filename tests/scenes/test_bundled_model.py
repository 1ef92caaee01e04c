"""The bundled model: open_clip loads it, its files are small, and it meets every bar on a sample."""

import json

import pytest

from clipfast.scenes import evaluate

FOLDER = evaluate.MODEL_DIR


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 15e6


def test_configuration_matches_the_tokenizer() -> None:
    model, tokenizer, _ = evaluate.load()
    settings = json.loads((FOLDER / "open_clip_config.json").read_text())["model_cfg"]
    assert settings["text_cfg"]["vocab_size"] == tokenizer.vocab_size == model.vocab_size
    assert model.visual.conv1.out_channels % 64 == 0


@pytest.mark.parametrize("seed", [101])
@pytest.mark.slow
def test_bars_are_met_on_scenes_of_another_seed(seed: int) -> None:
    result = evaluate.evaluate(*evaluate.load(), scenes=700, seed=seed, lookalikes=400)
    print(evaluate.table(result))
    for name, bar in evaluate.BARS.items():
        assert result["attributes"][name]["accuracy"] >= bar, name
    assert result["lookalikes"]["gap"] >= evaluate.WORST_GROUP_GAP
    assert result["passed"]

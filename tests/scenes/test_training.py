"""Training: a tiny run from end to end, resumption, export, and the parts alone."""

import csv
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfast.scenes import evaluate
from clipfast.scenes.captions import prompts
from clipfast.scenes.tokenizer import MERGES_FILE
from clipfast.scenes.training.__main__ import DEFAULT_CONFIG, main
from clipfast.scenes.training.batches import Batches
from clipfast.scenes.training.config import Config, Stage, read_config
from clipfast.scenes.training.contrastive import pair_loss, text_features
from clipfast.scenes.training.curve import write_curve
from clipfast.scenes.training.network import position_waves
from clipfast.scenes.training.optim import make_optimiser, orthogonalise
from clipfast.scenes.training.pool import PATCH, draw, open_pool
from clipfast.scenes.training.run import COLUMNS, LOG, Run
from clipfast.scenes.vocabulary import ATTRIBUTES

TINY = """
pool = 48
held_out = 24
evaluate_every = 32
late = 1
[network]
embed_dim = 32
vision_width = 64
vision_head = 32
vision_layers = 2
text_width = 64
text_layers = 1
[[stage]]
name = "warmup"
samples = 48
batch = 16
lr = 1e-3
rise = 2
[[stage]]
name = "contrastive"
samples = 48
batch = 16
lr = 1e-3
contrastive = 1.0
prompts = 1.0
specialisation = 1.0
bypass = 1.0
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, with its export in `model`."""
    out = tmp_path_factory.mktemp("run")
    # keep the number of threads of the test process
    threads = str(torch.get_num_threads())
    command = ["--config", str(settings), "--out", str(out), "--threads", threads]
    assert main([*command, "--export", str(out / "model")]) == 0
    return out


def test_interrupted_run_ends_with_the_same_weights(settings: Path, finished: Path, tmp_path: Path) -> None:
    uninterrupted = Run(read_config(settings), finished)
    for steps in (2, 2, 1):
        assert not Run(read_config(settings), tmp_path, workers=1).train(stop_after=steps)
    last = Run(read_config(settings), tmp_path, workers=1)
    assert last.train()
    for name, value in uninterrupted.model.state_dict().items():
        assert torch.equal(value, last.model.state_dict()[name]), name
    losses = []
    for folder in (finished, tmp_path):
        with (folder / LOG).open(newline="") as file:
            losses.append([(row["stage"], row["samples"], row["shape"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1]


def test_log_has_all_columns(finished: Path) -> None:
    with (finished / LOG).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["stage"] for row in rows] == ["warmup", "warmup", "contrastive", "contrastive"]
    assert rows[-1]["samples"] == "96"
    assert float(rows[-1]["pairs"]) > 0
    assert rows[0]["pairs"] == ""


def test_export_loads_through_open_clip(finished: Path) -> None:
    model, tokenizer, preprocess = evaluate.load(finished / "model")
    assert json.loads((finished / "model/open_clip_config.json").read_text())["model_cfg"]["text_cfg"][
        "vocab_size"
    ] == (tokenizer.vocab_size)
    result = evaluate.evaluate(model, tokenizer, preprocess, scenes=30, lookalikes=8)
    assert set(ATTRIBUTES) <= set(result["attributes"])
    assert result["lookalikes"]["scenes"] == 8
    assert result["attributes"]["background"]["scenes"] == 30
    assert not result["passed"]
    assert "all bars met: no" in evaluate.table(result)
    names = {path.name for path in (finished / "model").iterdir()}
    assert names >= {MERGES_FILE, "training.toml", "training_log.csv", "training_curve.svg"}
    # the weights are rounded to float16 and otherwise equal
    trained = Run(read_config(finished / "model/training.toml"), finished).model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name].half().float(), rtol=0, atol=0)


def test_text_features_of_short_rows_equal_open_clips(finished: Path) -> None:
    model, tokenizer, _ = evaluate.load(finished / "model")
    texts = [options[0] for options in prompts("position").values()]
    tokens = tokenizer(texts)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(text_features(model, tokens[:, :10]), expected, rtol=1e-5, atol=1e-6)


def test_export_now_requires_export(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--export-now"])
    assert "--export-now needs --export" in capsys.readouterr().err


def test_default_config_is_valid() -> None:
    config = read_config(DEFAULT_CONFIG)
    assert [stage.reads_text for stage in config.stages] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [("seed = 1", "no \\[\\[stage\\]\\]"), ("speed = 1\n" + TINY, "unknown keys for Config: speed")],
)
def test_invalid_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "wrong.toml")


def test_learning_rate_rises_and_falls() -> None:
    stage = Stage("s", samples=1000, batch=10, lr=2.0, floor=0.1, rise=10, fall=0.5)
    rates = [stage.rate(step) for step in range(stage.steps)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[20] == 2.0
    assert rates[75] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert 0.2 <= rates[-1] < 0.25


def test_pool_equals_directly_drawn_scenes(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, 0, 20)
    again = open_pool(tmp_path, 0, 20)
    direct = draw(0, "train", range(20))
    for name, value in direct.__dict__.items():
        np.testing.assert_array_equal(getattr(pool, name), value)
        np.testing.assert_array_equal(getattr(again, name), value)
    bits = np.unpackbits(pool.outline, axis=2)
    assert bits.shape == (20, 64, PATCH * PATCH)
    np.testing.assert_allclose(bits.mean(axis=2), pool.coverage / 255, atol=0.003)


def test_batches_depend_only_on_their_step(finished: Path, settings: Path) -> None:
    config = read_config(settings)
    run = Run(config, finished)
    batches = Batches(config, draw(0, "train", range(48)), run.tokenizer)
    first, again = (batches.make(1, config.stages[1], 2) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert first.captions is not None
    assert again.captions is not None
    assert first.truth is not None
    assert torch.equal(first.captions, again.captions)
    # the captions of an image are true of it
    own = torch.arange(16).repeat_interleave(config.texts)
    assert bool(first.truth[own, torch.arange(32)].all())
    assert first.prompts is not None
    assert len(first.prompts) == sum(map(len, ATTRIBUTES.values()))


def test_pair_loss_by_hand() -> None:
    images = torch.eye(2)
    truth = torch.eye(2, dtype=torch.bool)
    expected = math.log(1 + math.exp(-3.0))
    assert float(pair_loss(images, images, truth, torch.tensor(3.0))) == pytest.approx(expected, rel=1e-5)
    # if all pairs are true, equal scores are optimal and have loss zero
    everything = torch.ones(2, 2, dtype=torch.bool)
    same = torch.ones(2, 1)
    assert float(pair_loss(same, same, everything, torch.tensor(3.0))) == pytest.approx(0.0, abs=1e-6)


def test_orthogonalise_equalises_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20), (3, 24, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_optimiser_reduces_the_loss_with_both_rules() -> None:
    torch.manual_seed(0)
    hidden, out = torch.nn.Linear(16, 48), torch.nn.Linear(48, 4)
    model = torch.nn.Sequential(OrderedDict(resblocks=hidden, act=torch.nn.GELU(), out=out))
    optimiser = make_optimiser([model], lr=2e-2)
    assert [group["orthogonal"] for group in optimiser.param_groups] == [False, True]
    assert optimiser.param_groups[1]["params"] == [hidden.weight]
    x = torch.randn(64, 16)
    target = (x[:, :4] * x[:, 4:8]).sin()
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_position_waves_are_distinct() -> None:
    waves = position_waves(8, 192)
    assert waves.shape == (64, 192)
    distances = torch.cdist(waves, waves) + 100 * torch.eye(64)
    assert float(distances.min()) > 1.0


def test_curve_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("stage,samples,whole,shape\na,10,1.5,0.2\nb,20,0.5,nan\n")
    write_curve(tmp_path / "log.csv", tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert text.startswith("<svg")
    assert text.count("<polyline") == 2
    (tmp_path / "empty.csv").write_text("stage,samples\n")
    with pytest.raises(ValueError, match="no lines"):
        write_curve(tmp_path / "empty.csv", tmp_path / "curve.svg")


def test_default_config_has_no_stages() -> None:
    assert Config().stages == ()

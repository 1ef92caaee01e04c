"""A script in the style of the paper's package runs after one import is changed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from builders import randomise
from PIL import Image
from safetensors.torch import save_file
from tolerances import FLOAT32, GOLDEN, SUM_FLOAT32

import clipfast
from clipfast import descriptions
from clipfast.compat.clip_text_span import TextSpanFolder, read_folder
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene

SCRIPT = Path(__file__).with_name("published_script.py")
PUBLISHED = "from prs_hook import hook_prs_logger, replace_with_iterative_removal\n"
CHANGED = "from clipfast.compat.clip_text_span import hook_prs_logger, replace_with_iterative_removal\n"
COUNT, TEXTS, PICKED = 12, 40, 4
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script read and wrote."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "model").mkdir()
    model = randomise(open_clip.CLIP(**CONFIG), 3)
    save_file(model.state_dict(), folder / "model" / "open_clip_model.safetensors")
    described = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}}
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(described))
    for index in range(COUNT):
        place = folder / "images" / ("forest", "sea")[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(sample_scene(0, "test", index))).save(place / f"{index:02}.png")
    (folder / "pool.txt").write_text("".join(f"{text}\n" for text in descriptions.pool("scenes")[:TEXTS]))
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(PUBLISHED) == 1
    (folder / "script.py").write_text(source.replace(PUBLISHED, CHANGED), encoding="utf-8")
    arguments = ["--model", "local-dir:model", "--name", "tiny", "--data_path", "images"]
    arguments += ["--texts", "pool.txt", "--output_dir", ".", "--batch_size", "5", "--num_of_last_layers", "2"]
    command = [sys.executable, "script.py", *arguments, "--texts_per_head", str(PICKED)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "baseline",
        "mean-ablated MLPs",
        "replaced by texts",
    ]
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> TextSpanFolder:
    return read_folder(folder, "images", "tiny")


@pytest.mark.slow
def test_its_files_are_those_of_the_model(folder: Path, data: TextSpanFolder) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'model'}")
    paths = sorted((folder / "images").rglob("*.png"))
    pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
    with torch.no_grad():
        embeddings = model.eval().encode_image(pixels, normalize=True)
    assert data.attn.shape == (COUNT, 3, 2, 24)
    np.testing.assert_allclose(data.embeddings(), embeddings.numpy(), atol=SUM_FLOAT32)
    made = clipfast.wrap(model).decompose(pixels, class_token=True)
    np.testing.assert_allclose(data.attn, made.heads().numpy(), atol=FLOAT32)
    assert data.cls_attn is not None
    np.testing.assert_allclose(data.cls_attn, made.class_token().numpy(), atol=FLOAT32)
    np.testing.assert_allclose(data.mlp, made.start_and_mlps().numpy(), atol=GOLDEN)


def test_its_texts_are_those_of_textspan(data: TextSpanFolder) -> None:
    heads = data.completeness["pool", PICKED]
    assert list(heads) == [(layer, head) for layer in (1, 2) for head in range(2)]
    pool = data.pools["pool"]
    for (layer, head), texts in heads.items():
        outputs = torch.from_numpy(data.attn[:, layer, head].copy())
        span = clipfast.textspan(outputs, torch.from_numpy(pool.features.copy()), PICKED)
        assert texts == tuple(pool.texts[pick] for pick in span.picks)


def test_it_changes_one_line() -> None:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = "".join(lines).replace(PUBLISHED, CHANGED).splitlines(keepends=True)
    assert [line for line, other in zip(lines, changed, strict=True) if line != other] == [PUBLISHED]

"""Commands on a model whose attention pool reads tokens without a class token, from a folder of transformers."""

import json
import logging
from pathlib import Path

import pytest
import transformers
from builders import randomise
from commandline import inside, picture
from tokenizers import Tokenizer, models, pre_tokenizers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_WORDS = ("<pad>", "<unk>", "</s>", "a", "photo", "of", "cat", "dog")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.SiglipConfig(
        text_config={**_SIZES, "vocab_size": len(_WORDS), "max_position_embeddings": 16},
        vision_config={**_SIZES, "image_size": 28, "patch_size": 14},
    )
    randomise(transformers.SiglipModel(config), 0).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def collected(siglip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(8):
        kind = folder / "images" / ("cat", "dog")[seed % 2]
        kind.mkdir(parents=True, exist_ok=True)
        picture(seed).save(kind / f"{seed}.png")
    options = ("--model", siglip, "--labels", "folder", "--out", folder / "collected")
    assert inside("collect", folder / "images", *options).returncode == 0
    return folder / "collected"


def test_ablations_leave_out_the_class_token(collected: Path, tmp_path: Path) -> None:
    ran = inside("ablate", collected, "--prompt", "a photo of {}", "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    written = json.loads((tmp_path / "ablate.json").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in written["ablations"]]
    assert names == ["nothing", "all MLPs", "attention of layers 0 to 0"]


def test_a_report_with_labels_leaves_out_the_class_token(collected: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = inside("report", collected, "--prompt", "a photo of {}", "--pool", "random", "--out", page)
    assert ran.returncode == 0, ran.stderr
    text = page.read_text(encoding="utf-8")
    assert "all MLPs" in text
    assert "CLS→CLS" not in text

"""Captions: their truth for any scene, wording and tokens."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from clipfast.scenes.captions import caption, phrase, prompts, words
from clipfast.scenes.encoding import encode_assertion, encode_scenes, holds, truth_matrix
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.tokenizer import MERGES_FILE, learn_merges, load_tokenizer, write_merges
from clipfast.scenes.vocabulary import ATTRIBUTES

SCENES = [sample_scene(2, "train", index) for index in range(400)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_merges(path / MERGES_FILE)
    return path


def plain_truth(asserted: dict[str, str], scene: Scene) -> bool:
    """Whether an assertion is true of a scene, checked object by object."""
    if any(getattr(scene, name) != asserted[name] for name in ("background", "lighting") if name in asserted):
        return False
    named = [name for name in ("shape", "colour", "texture", "size", "position") if name in asserted]
    matching = [item for item in scene.objects if all(getattr(item, n) == asserted[n] for n in named)]
    if "count" in asserted:
        return len(matching) == 1 + ATTRIBUTES["count"].index(asserted["count"])
    return bool(matching)


def test_truth_of_captions_for_all_scenes() -> None:
    rng = np.random.default_rng(0)
    captions = [caption(scene, rng) for scene in SCENES]
    truth = truth_matrix(encode_scenes(SCENES), np.stack([encode_assertion(c.asserted) for c in captions]))
    assert truth.diagonal().all()
    assert 0.02 < truth.mean() < 0.25
    for row, scene in enumerate(SCENES[:60]):
        expected = [plain_truth(dict(drawn.asserted), scene) for drawn in captions]
        assert truth[row].tolist() == expected


def test_count_includes_matching_objects_of_both_kinds() -> None:
    pairs = [s for s in (sample_scene(2, "train", i) for i in range(600)) if len({o.texture for o in s.objects}) == 1]
    pairs = [scene for scene in pairs if len(scene.kinds) == 2]
    rng = np.random.default_rng(0)
    drawn = [caption(scene, rng).asserted for scene in pairs for _ in range(50)]
    counted = [asserted for asserted in drawn if set(asserted) == {"texture", "count"}]
    assert counted
    assert {asserted["count"] for asserted in counted} == {"two"}


def test_holds_on_examples() -> None:
    scene = next(s for s in SCENES if len(s.objects) == 3)
    item = scene.objects[0]
    assert holds({"shape": item.shape, "count": "three"}, scene)
    assert not holds({"shape": item.shape, "count": "two"}, scene)
    assert holds({"colour": item.colour}, scene)
    assert not holds({"position": "left"}, scene)
    pair = next(s for s in SCENES if len(s.kinds) == 2)
    first, second = pair.objects
    assert holds({"shape": first.shape, "colour": first.colour}, pair)
    assert not holds({"shape": first.shape, "colour": second.colour}, pair)
    assert holds({"count": "two"}, pair)
    assert holds({"shape": first.shape, "count": "one"}, pair)
    with pytest.raises(ValueError, match="unknown attributes: mood"):
        holds({"mood": "calm"}, scene)


def test_captions_vary() -> None:
    rng = np.random.default_rng(1)
    captions = [caption(scene, rng) for scene in SCENES]
    assert len({c.text for c in captions}) > 300
    assert {len(c.asserted) for c in captions} == {1, 2, 3, 4, 5}
    assert {name for c in captions for name in c.asserted} == set(ATTRIBUTES)
    assert all(c.text and c.text == c.text.lower().strip() and "  " not in c.text for c in captions)


def test_captions_are_reproducible() -> None:
    first = [caption(scene, np.random.default_rng(4)).text for scene in SCENES[:30]]
    assert first == [caption(scene, np.random.default_rng(4)).text for scene in SCENES[:30]]


def test_grammar() -> None:
    rng = np.random.default_rng(0)
    texts = [phrase({"colour": "orange", "shape": "star"}, rng) for _ in range(20)]
    assert all("an orange star" in text for text in texts)
    texts = [phrase({"count": "three", "shape": "cross"}, rng) for _ in range(40)]
    assert all("three crosses" in text and "is three" not in text for text in texts)


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_prompts_cover_all_classes(attribute: str) -> None:
    texts = prompts(attribute)
    assert tuple(texts) == ATTRIBUTES[attribute]
    flat = [text for options in texts.values() for text in options]
    assert len(flat) == len(set(flat))
    assert all(len(options) >= 3 for options in texts.values())


def test_prompts_reject_an_unknown_attribute() -> None:
    with pytest.raises(ValueError, match="unknown attribute 'mood'"):
        prompts("mood")


def test_every_word_is_one_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert all(len(tokenizer.encode(word.strip(","))) == 1 for word in words())
    rng = np.random.default_rng(3)
    texts = [caption(scene, rng).text for scene in SCENES]
    texts += [text for name in ATTRIBUTES for options in prompts(name).values() for text in options]
    for text in texts:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.replace(",", " ,").split()), text
        assert tokenizer.decode(ids).split() == text.replace(",", " ,").split()
        assert len(ids) <= tokenizer.context_length - 2


def test_merges_file_is_reproducible(folder: Path, tmp_path: Path) -> None:
    write_merges(tmp_path / "again.gz")
    data = (folder / MERGES_FILE).read_bytes()
    assert (tmp_path / "again.gz").read_bytes() == data
    lines = gzip.decompress(data).decode().split("\n")
    assert 200 <= len(lines) - 1 <= 800
    assert all(len(line.split()) == 2 for line in lines[1:])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 512 + len(lines) - 1 + 2
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1


def test_learn_merges_by_hand() -> None:
    assert learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
    assert learn_merges([]) == []


def test_missing_merges_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no merges file"):
        load_tokenizer(tmp_path)


_TOKENIZERS: dict[str, SimpleTokenizer] = {}


@given(text=st.text(max_size=80))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_can_be_encoded(text: str, folder: Path) -> None:
    tokenizer = _TOKENIZERS.setdefault("one", load_tokenizer(folder))
    ids = tokenizer([text])[0]
    assert ids.shape == (32,)
    assert int(ids.max()) == tokenizer.eot_token_id
    assert int(ids.min()) >= 0

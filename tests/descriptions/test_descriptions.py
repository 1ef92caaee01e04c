"""The text pools: files, language and categories; text files of users; random vectors; grammar."""

import re
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from tolerances import UNIT_NORM

from clipfast import InputError, descriptions
from clipfast.descriptions import compose, grammar
from clipfast.scenes.captions import prompts
from clipfast.scenes.vocabulary import ATTRIBUTES

CONTEXT = 77  # context length of CLIP's text towers, start and end token included
MARKUP = re.compile(r"[{}|_<>*#]|\s{2}|^\s|\s$|\.\.")


@pytest.mark.parametrize("name", descriptions.POOLS)
def test_committed_files_equal_those_of_the_script(name: str) -> None:
    files = compose.files()
    for file in (f"{name}.txt", descriptions.INDEX.name):
        assert (descriptions.FOLDER / file).read_bytes() == files[file].encode()


def test_script_writes_all_files(tmp_path: Path) -> None:
    assert compose.main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{name}.txt" for name in descriptions.POOLS), "index.toml"}
    assert (tmp_path / "general.txt").read_bytes() == (descriptions.FOLDER / "general.txt").read_bytes()


@pytest.mark.parametrize("name", descriptions.POOLS)
def test_texts_are_distinct_and_plain(name: str) -> None:
    texts = descriptions.pool(name)
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    assert [text for text, count in counts.items() if count > 1] == []
    assert [text for text in texts if not text.isascii() or MARKUP.search(text)] == []
    assert (descriptions.FOLDER / f"{name}.txt").read_text(encoding="utf-8").endswith(f"{texts[-1]}\n")


@pytest.mark.parametrize("name", descriptions.POOLS)
def test_texts_fit_the_context_length(name: str) -> None:
    tokenizer = open_clip.SimpleTokenizer()
    assert max(len(tokenizer.encode(text)) for text in descriptions.pool(name)) + 2 <= CONTEXT


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("general", 3300, 3700), ("common_words", 1500, 6000), ("classes", 500, 1500), ("scenes", 1000, 2000)],
)
def test_sizes(name: str, least: int, most: int) -> None:
    assert least <= len(descriptions.pool(name)) <= most


@pytest.mark.parametrize("name", ["general", "scenes"])
def test_articles(name: str) -> None:
    """ "an" before a vowel and "a" before a consonant, except for the words below and the letter A."""
    like_vowel = {"X-ray", "hourglass"}
    like_consonant = {"unicycle", "unicorn", "uniform", "ukulele", "eucalyptus", "university", "ukiyo-e", "one-man"}
    wrong = []
    for text in descriptions.pool(name):
        for article, word in re.findall(r"\b([Aa]n?) ([\w'-]+)", text):
            if article == "A" and not text.startswith("A ") and not text.startswith("An "):
                continue  # the letter A
            vowel = word in like_vowel or (word[0].lower() in "aeiou8" and word not in like_consonant)
            if (article.lower() == "an") != vowel:
                wrong.append(f"{article} {word}")
    assert wrong == []


def test_descriptions_differ_in_content_words() -> None:
    """No two descriptions are equal without function words and openings."""
    ignored = {
        *(
            "a",
            "an",
            "the",
            "of",
            "with",
            "in",
            "it",
            "is",
            "are",
            "as",
            "to",
            "and",
            "that",
            "this",
            "there",
            "on",
            "at",
        ),
        *("image", "photo", "picture", "photograph", "show", "showing", "someone", "somebody", "person", "people"),
    }

    def content(text: str) -> frozenset[str]:
        words = (word.removesuffix("s") for word in re.findall(r"[\w'-]+", text.lower()))
        return frozenset(word for word in words if word not in ignored)

    by_content: dict[frozenset[str], list[str]] = {}
    for text in descriptions.pool("general"):
        by_content.setdefault(content(text), []).append(text)
    assert [texts for texts in by_content.values() if len(texts) > 1] == []


def test_descriptions_are_capitalised_and_varied() -> None:
    texts = descriptions.pool("general")
    assert [text for text in texts if not text[0].isupper() or text.endswith((".", ","))] == []
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    assert max(openings.values()) <= len(texts) / 6  # varied, like those of annotators


def test_categories() -> None:
    categories = descriptions.categories("general")
    assert list(categories) == descriptions.pool("general")
    counts = Counter(categories.values())
    assert len(counts) >= 30
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= len(categories) / 10
    assert categories["An image dominated by the colour red"] == "colour"
    assert categories["A photo of the letter A"] == "text"
    assert descriptions.categories("classes")["giraffe"] == "mammals"
    for name in descriptions.POOLS:
        assert list(descriptions.categories(name)) == descriptions.pool(name)


def test_categories_equal_the_word_lists() -> None:
    folder = descriptions.FOLDER / "words" / "general"
    assert set(descriptions.categories().values()) == {path.stem for path in folder.glob("*.toml")}


# ---------------------------------------------------------------------------------------------------------- scenes

# Words for every attribute, independent of the tables of the captions.
ATTRIBUTE_WORDS = {
    "shape": "circle square triangle star cross heart crescent ring flower gear",
    "colour": "red orange yellow green blue purple pink white",
    "texture": "plain solid striped dotted spotted checkered chequered",
    "size": "small little large big",
    "count": "one single only two three four",
    "position": "left right top bottom centre middle",
    "background": "sea ocean water forest woods trees desert dunes sand night snow snowy winter city town street"
    " buildings sky",
    "lighting": "bright brightly dim dimly normal normally",
}


def named_attributes(text: str) -> set[str]:
    for background in ("under the stars", "starry night"):  # not a shape
        text = text.replace(background, "night")
    words = set(text.replace(",", "").split())
    return {
        name
        for name, listed in ATTRIBUTE_WORDS.items()
        if words & {form for word in listed.split() for form in forms(word)}
    }


def forms(word: str) -> tuple[str, ...]:
    return word, f"{word}s", f"{word}es"


def test_scene_texts_name_exactly_their_attributes() -> None:
    categories = descriptions.categories("scenes")
    assert [
        (text, names) for text, names in categories.items() if named_attributes(text) != set(names.split(", "))
    ] == []


def test_scene_attributes_cover_every_value() -> None:
    attributes = descriptions.scene_attributes()
    assert set(attributes.values()) == set(ATTRIBUTES)
    assert set(attributes) <= set(descriptions.pool("scenes"))
    for attribute in ATTRIBUTES:
        for value, texts in prompts(attribute).items():
            own = [text for text in texts if attributes[text] == attribute]
            assert own == texts, value
            assert len(own) >= 3
    assert all(len(named_attributes(text)) == 1 for text in attributes)


def test_scene_combinations() -> None:
    names = set(descriptions.categories("scenes").values())
    pairs = {name for name in names if name.count(",") == 1}
    assert len(pairs) == len(ATTRIBUTES) * (len(ATTRIBUTES) - 1) // 2
    assert any(name.count(",") == 2 for name in names)


# ----------------------------------------------------------------------------------------------------- users' files


def test_read_skips_blank_lines_and_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa dog\r\n\r\n  A  Dog \r\nein Hund, größer\n\t\nA cat\nA dog".encode())
    pool = descriptions.read(path)
    assert pool.texts == ("a dog", "ein Hund, größer", "A cat")
    assert pool.blank == (2, 5)
    assert pool.duplicates == ((3, 1), (7, 1))
    assert pool.notes == (
        f"{path}: 2 blank lines left out: lines 2, 5",
        f"{path}: 2 duplicates left out: lines 3 (as 1), 7 (as 1)",
    )


def test_file_without_skipped_lines_has_no_notes(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one\ntwo\n")
    assert descriptions.read(path).texts == ("one", "two")
    assert descriptions.read(path).notes == ()
    path.write_text("one\ntwo")
    assert descriptions.read(path).notes == ()


def test_notes_list_only_the_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("x\n" * 9)
    assert descriptions.read(path).notes == (
        f"{path}: 8 duplicates left out: lines 2 (as 1), 3 (as 1), 4 (as 1), 5 (as 1), 6 (as 1) and 3 more",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "contains no text"),
        (b"\n  \n\t\n", "contains no text"),
        (b"\xef\xbb\xbf", "contains no text"),
        (b"fine\nmore\ncaf\xe9\n", "is not UTF-8: byte 0xe9 in line 3; save it as UTF-8"),
        ("a dog\n".encode("utf-16"), "is not UTF-8: byte 0xff in line 1"),
        ("a dog\n".encode("utf-16-le"), "a zero byte in line 1"),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        descriptions.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_and_missing_file_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        descriptions.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        descriptions.read(tmp_path / "none.txt")


def test_unknown_pool_is_rejected() -> None:
    for call in (descriptions.pool, descriptions.categories):
        with pytest.raises(InputError, match="there is no pool 'generl': choose one of general, classes"):
            call("generl")


# ---------------------------------------------------------------------------------------------------------- random


def test_random_features() -> None:
    vectors = descriptions.random_features(500, 64, seed=3)
    assert (vectors.shape, vectors.dtype) == ((500, 64), torch.float32)
    assert float((vectors.norm(dim=1) - 1).abs().max()) <= UNIT_NORM
    assert torch.equal(vectors, descriptions.random_features(500, 64, seed=3))
    assert not torch.equal(vectors, descriptions.random_features(500, 64, seed=4))
    assert float(vectors.mean(0).abs().max()) < 0.03  # five standard errors of a coordinate
    with pytest.raises(InputError, match="0 random features of width 64"):
        descriptions.random_features(0, 64)


# --------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("phrase", "article"),
    [
        *[("apple", "an"), ("dog", "a"), ("hour", "an"), ("house", "a"), ("unicorn", "a"), ("unimportant thing", "an")],
        *[("umbrella", "an"), ("European", "a"), ("X-ray", "an"), ("T-shirt", "a"), ("LED", "an"), ("UFO", "a")],
        *[
            ("8-sided die", "an"),
            ("18th birthday", "an"),
            ("180-degree turn", "a"),
            ("1000", "a"),
            ("one-way street", "a"),
            ("F", "an"),
        ],
    ],
)
def test_articles_by_hand(phrase: str, article: str) -> None:
    assert grammar.article(phrase) == article


PLURALS = """
dog dogs, box boxes, church churches, stomach stomachs, city cities, boy boys, leaf leaves, knife knives, wolf
wolves, roof roofs, potato potatoes, photo photos, man men, fisherman fishermen, human humans, grandchild
grandchildren, mouse mice, sheep sheep, bus buses, quiz quizzes, scarf scarves, dwarf dwarfs, cliff cliffs,
thief thieves, half halves
"""


@pytest.mark.parametrize("pair", PLURALS.split(","))
def test_plurals_by_hand(pair: str) -> None:
    singular, many = pair.split()
    assert grammar.plural(singular) == many
    assert grammar.plural(f"red {singular}") == f"red {many}"


VERBS = """
walk walks walked walking, stop stops stopped stopping, travel travels travelled travelling, open opens opened
opening, try tries tried trying, play plays played playing, die dies died dying, agree agrees agreed agreeing,
use uses used using, watch watches watched watching, equip equips equipped equipping, suit suits suited suiting,
ski skis skied skiing, fix fixes fixed fixing, stir stirs stirred stirring, visit visits visited visiting, fear
fears feared fearing
"""


@pytest.mark.parametrize("forms", VERBS.split(","))
def test_verbs_by_hand(forms: str) -> None:
    assert list(grammar.verb_forms(forms.split()[0])) == forms.split()

"""The English grammar needed to compose descriptions: articles, plurals, forms of regular verbs."""

from typing import Final

VOWELS: Final = "aeiou"

_SOUNDS_LIKE_A_VOWEL: Final = ("hour", "honest", "heir", "honour")
_SOUNDS_LIKE_A_CONSONANT: Final = ("uni", "use", "usual", "ute", "uku", "eu", "ewe", "one", "once", "ubi")
_VOWEL_AFTER_ALL: Final = ("unin", "unim", "unid")  # the prefix un-: uninhabited
_SPELT_OUT: Final = "AEFHILMNORSX"
"""Letters whose names begin with a vowel sound: an F, an X-ray."""

NO_ARTICLE: Final = frozenset(
    {
        *(
            "chopsticks",
            "pliers",
            "headphones",
            "binoculars",
            "scissors",
            "skis",
            "maracas",
            "bagpipes",
            "kitchen scales",
        ),
        *("jeans", "shorts", "leggings", "pyjamas", "sunglasses", "spectacles", "needle and thread", "bow and arrow"),
        *(
            "popcorn",
            "lemonade",
            "hot chocolate",
            "bubble tea",
            "ivy",
            "moss",
            "bamboo",
            "aloe vera",
            "lavender",
            "clover",
        ),
        *("wheat", "garlic", "spinach", "broccoli", "sweetcorn", "asparagus", "celery", "jelly", "risotto", "paella"),
        *("lasagne", "falafel", "fondue", "grilled fish", "curry"),
    }
)
"""Names without an indefinite article: plurals, pairs and mass nouns."""

_PLURALS: Final = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "salmon": "salmon",
    "aircraft": "aircraft",
    "series": "series",
    "species": "species",
    "roof": "roofs",
    "stomach": "stomachs",
    "chief": "chiefs",
    "brief": "briefs",
    "belief": "beliefs",
    "proof": "proofs",
    "cliff": "cliffs",
    "reef": "reefs",
    "scarf": "scarves",
    "quiz": "quizzes",
    "crisis": "crises",
}
_NO_MEN: Final = frozenset({"human", "German", "Roman", "shaman", "talisman"})
_ES_AFTER_O: Final = frozenset({"tomato", "potato", "hero", "echo", "mango", "mosquito", "volcano", "torpedo"})

_DOUBLES: Final = frozenset(
    {
        *("admit", "permit", "prefer", "refer", "regret", "occur", "commit", "control", "travel", "cancel", "label"),
        *("begin", "forget"),
        *("signal", "quarrel", "equip", "model", "level", "fulfil", "kidnap"),
    }
)
"""Verbs of several syllables that double their last consonant (British spelling)."""


def article(phrase: str) -> str:
    """The indefinite article of a phrase, ``"a"`` or ``"an"``, from the sound of its first word."""
    word = phrase.split()[0].strip("\"'(")
    if word[:1].isdigit():
        return "an" if word[0] == "8" or (word.startswith(("11", "18")) and len(word) in (2, 4)) else "a"
    if len(word) == 1 or (word[0].isupper() and not word[1].isalpha()) or (word.isupper() and len(word) < 4):
        return "an" if word[0].upper() in _SPELT_OUT else "a"
    low = word.lower()
    if low.startswith(_SOUNDS_LIKE_A_VOWEL):
        return "an"
    if low.startswith(_SOUNDS_LIKE_A_CONSONANT) and not low.startswith(_VOWEL_AFTER_ALL):
        return "a"
    return "an" if low[0] in VOWELS else "a"


def with_article(phrase: str) -> str:
    """The phrase with its indefinite article; unchanged if it takes none (:data:`NO_ARTICLE`)."""
    return phrase if phrase in NO_ARTICLE else f"{article(phrase)} {phrase}"


def plural(noun: str) -> str:
    """The plural of a singular noun; the last of several words is inflected."""
    before, space, word = noun.rpartition(" ")
    return before + space + _plural(word)


def _plural(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    for ending in ("man", "child"):  # fisherman, grandchild
        if word.endswith(ending) and word not in _NO_MEN:
            return word.removesuffix(ending) + _PLURALS[ending]
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in _ES_AFTER_O:
        return word + "es"
    if word.endswith(("lf", "rf", "eaf", "oaf", "ief")) and not word.endswith(("arf", "urf", "golf", "gulf")):
        return word[:-1] + "ves"
    if word.endswith("ife"):
        return word[:-2] + "ves"
    return word + "s"


def verb_forms(verb: str) -> tuple[str, str, str, str]:
    """A regular verb with its third person, past and present participle: ``walk, walks, walked, walking``."""
    return verb, third_person(verb), past(verb), participle(verb)


def third_person(verb: str) -> str:
    """The third person of a verb: ``watches`` for ``watch``."""
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def past(verb: str) -> str:
    """The past of a regular verb: ``stopped`` for ``stop``."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    return _doubled(verb) + "ed"


def participle(verb: str) -> str:
    """The present participle of a verb: ``making`` for ``make``."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    return _doubled(verb) + "ing"


def _doubled(verb: str) -> str:
    """The verb with its last consonant doubled if a short stressed vowel precedes it."""
    syllables = sum(
        letter in VOWELS and (place == 0 or verb[place - 1] not in VOWELS) for place, letter in enumerate(verb)
    )
    short = len(verb) > 2 and verb[-1] not in VOWELS + "wxy" and verb[-2] in VOWELS and verb[-3] not in VOWELS
    short = short or (
        len(verb) > 3 and verb[-3:-1] in ("ui", "ua") and verb[-4] == "q" and verb[-1] not in VOWELS + "wxy"
    )
    return verb + verb[-1] if short and (syllables == 1 or verb in _DOUBLES) else verb

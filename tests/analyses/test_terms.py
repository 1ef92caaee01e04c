"""Sets of terms and their text."""

from dataclasses import dataclass

import pytest
from builders import vision_tower
from hypothesis import given
from hypothesis import strategies as st

import clipfast
from clipfast.analyses.terms import Terms, as_terms


@dataclass(frozen=True)
class Sized:
    """A model as far as terms look at it."""

    layers: int = 12
    heads: int = 4


TWELVE = Sized()


@st.composite
def sets(draw: st.DrawFn, shape: Sized | None = None) -> Terms:
    shape = shape or Sized(draw(st.integers(1, 12)), draw(st.integers(1, 4)))
    layer = st.integers(0, shape.layers - 1)
    return Terms.of(
        shape,
        heads=draw(st.lists(st.tuples(layer, st.integers(0, shape.heads - 1))))
        + [(whole, head) for whole in draw(st.lists(layer)) for head in range(shape.heads)],
        start=draw(st.booleans()),
        mlps=draw(st.lists(layer)),
        class_tokens=draw(st.lists(layer)),
    )


def heads(*layers: int) -> frozenset[tuple[int, int]]:
    return frozenset((layer, head) for layer in layers for head in range(4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("start", Terms.of(TWELVE, start=True)),
        ("mlps", Terms.of(TWELVE, mlps=range(12))),
        ("mlp 5", Terms.of(TWELVE, mlps=[5])),
        ("mlp 3-5", Terms.of(TWELVE, mlps=[3, 4, 5])),
        ("MLP -1", Terms.of(TWELVE, mlps=[11])),
        ("cls", Terms.of(TWELVE, class_tokens=range(12))),
        ("cls 0-1, cls 11", Terms.of(TWELVE, class_tokens=[0, 1, 11])),
        ("L4", Terms.of(TWELVE, heads=heads(4))),
        ("l4 , L4", Terms.of(TWELVE, heads=heads(4))),
        ("L0-L2", Terms.of(TWELVE, heads=heads(0, 1, 2))),
        ("L0-2", Terms.of(TWELVE, heads=heads(0, 1, 2))),
        ("L-2-L-1", Terms.of(TWELVE, heads=heads(10, 11))),
        ("L10-L-1", Terms.of(TWELVE, heads=heads(10, 11))),
        ("L5.H3", Terms.of(TWELVE, heads=[(5, 3)])),
        ("L5.attn.H3, L-1.mlp", Terms.of(TWELVE, heads=[(5, 3)], mlps=[11])),
        ("L-1.h0, mlp 0,start", Terms.of(TWELVE, start=True, heads=[(11, 0)], mlps=[0])),
        ("nothing", Terms.of(TWELVE)),
        ("nothing, start", Terms.of(TWELVE, start=True)),
    ],
)
def test_text_names_a_set(text: str, expected: Terms) -> None:
    assert Terms.parse(text, TWELVE) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^no terms are named: write start, mlps"),
        (" ", r"^no terms are named"),
        ("mlps, heads", r"^'heads' is no term: write start, .* \(layers are 0 to 11, heads 0 to 3\)$"),
        ("mlps,,cls", r"^'' is no term"),
        ("L5.H3.T2", r"^'L5\.H3\.T2' is no term"),
        ("H3", r"^'H3' is no term"),
        ("L12", r"^'L12': layer 12 does not exist: choose from 0 to 11, or negative from the end$"),
        ("L3, L0-L-13", r"^'L0-L-13': layer -13 does not exist"),
        ("mlp 12", r"^'mlp 12': layer 12 does not exist"),
        ("cls 3 - 99", r"^'cls 3 - 99': layer 99 does not exist"),
        ("L5.H4", r"^'L5\.H4': head 4 does not exist: heads are 0 to 3$"),
        ("L7-L3", r"^'L7-L3': the range goes down, from layer 7 to 3$"),
    ],
)
def test_text_that_names_none_is_quoted(text: str, message: str) -> None:
    with pytest.raises(clipfast.InputError, match=message):
        Terms.parse(text, TWELVE)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("L5.H1,L5.H0,L5.H2,L5.H3", "L5"),
        ("L3, L1, L2, L7.H1, L2.H0", "L1-L3, L7.H1"),
        ("cls 3,cls 4,mlp 0,mlp 2,start", "start, mlp 0, mlp 2, cls 3-4"),
        ("mlp 0-11, cls 0-11, L0-L11", "mlps, cls, L0-L11"),
        ("nothing, nothing", "nothing"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(Terms.parse(text, TWELVE)) == canonical
    assert repr(Terms.parse(text, TWELVE)) == f"Terms({canonical!r})"


@given(sets())
def test_text_and_back(terms: Terms) -> None:
    assert Terms.parse(str(terms), Sized(*terms.shape)) == terms


@given(sets(TWELVE), sets(TWELVE))
def test_union_and_difference(one: Terms, other: Terms) -> None:
    both, left = one | other, one - other
    for kind in ("heads", "mlps", "class_tokens"):
        assert getattr(both, kind) == getattr(one, kind) | getattr(other, kind)
        assert getattr(left, kind) == getattr(one, kind) - getattr(other, kind)
    assert both.start == (one.start or other.start)
    assert left.start == (one.start and not other.start)
    assert Terms.parse(f"{one}, {other}", TWELVE) == both
    assert bool(one) == (one != Terms.of(TWELVE))


def test_sets_of_a_model() -> None:
    model = clipfast.wrap(vision_tower())  # three layers of two heads
    assert str(Terms.all_heads(model)) == "L0-L2"
    assert str(Terms.all_mlps(model)) == "mlps"
    assert str(Terms.all_class_tokens(model)) == "cls"
    assert [str(terms) for terms in Terms.cumulative(model)] == ["L0", "L0-L1", "L0-L2"]
    assert str(Terms.attention(model, [-1, 0])) == "L0, L2"
    for same in (model.tower, model.basis()):
        assert Terms.parse("L0.H1, cls", same) == Terms.parse("L0.H1, cls", model)


def test_the_class_tokens_part_of_a_whole_layer_is_in_it_already() -> None:
    terms = Terms.parse("L1, L2.H0, cls 1-3", TWELVE)
    assert terms.layers == (1, 2, 3)
    assert terms.split_layers == (2, 3)  # of layer 1 it need not be known
    assert terms.whole(1)
    assert not terms.whole(2)


def test_terms_or_their_text() -> None:
    terms = Terms.parse("L1", TWELVE)
    assert as_terms("L1", TWELVE) == as_terms(terms, TWELVE) == terms
    message = "these terms are of different models: 12 layers of 4 heads, and 12 layers of 3 heads"
    for join in (
        lambda: as_terms(terms, Sized(12, 3)),
        lambda: terms | Terms.of(Sized(12, 3)),
        lambda: terms - Terms.of(Sized(12, 3)),
    ):
        with pytest.raises(clipfast.InputError, match=message):
            join()


@pytest.mark.parametrize("wrong", [{"heads": [(12, 0)]}, {"heads": [(0, -1)]}, {"mlps": [12]}, {"class_tokens": [-13]}])
def test_terms_that_do_not_exist(wrong: dict) -> None:
    with pytest.raises(clipfast.InputError, match="does not exist"):
        Terms.of(TWELVE, **wrong)


def test_the_terms_of_a_pooling() -> None:
    pool = Sized(layers=1)
    assert Terms.parse("pool", pool) == Terms.all_heads(pool)
    assert Terms.parse("pool.H3, Pool.mlp", pool) == Terms.of(pool, heads=[(0, 3)], mlps=[0])
    with pytest.raises(clipfast.InputError, match=r"^'pool.H3': these are the heads of the blocks, not of a pooling$"):
        Terms.parse("pool.H3", TWELVE)
    with pytest.raises(clipfast.InputError, match=r"^'pools' is no term"):
        Terms.parse("pools", pool)

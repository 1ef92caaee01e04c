"""Worst-group accuracy without the heads whose texts name scenery and places: experiment 6 of the paper."""

from clipfast.analyses.ablation import evaluate
from clipfast.analyses.selection import Chosen, by_texts, matching, terms_of
from clipfast.analyses.terms import Terms
from clipfast.commands.ablations import Removal, row
from clipfast.commands.heads import LATE_LAYERS, chosen_heads
from clipfast.commands.pools import RANDOM, pool_features
from clipfast.commands.reproduce.published import HEADS
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.errors import InputError
from clipfast.report.shares import rounded

WORDS = (
    *("forest", "trees", "woods", "jungle", "bamboo", "land", "field", "meadow", "mountain", "mountains", "desert"),
    *("city", "town", "street", "buildings", "countryside", "landscape", "scenery", "seaside"),
    *("sea", "ocean", "lake", "river", "water", "beach", "coast", "island", "harbour", "harbor", "snow"),
)
"""Words for places and scenery, of land and of water."""
_TOP, _AT_LEAST = 5, 3
PROTOCOL = (
    "The test split. Two classes, zero-shot; a group is a bird on a place. Means are over these same images.",
    f"The paper replaces all MLPs, the start of the stream, all attention before the last {LATE_LAYERS} layers, and "
    "heads that its authors chose by reading their texts. Rows show each part on its own.",
    f"Heads are chosen here by their texts alone, without labels: at least {_AT_LEAST} of a head's first {_TOP} texts "
    "contain a word for scenery or a place (--words), or they are named with --remove. Where the model is one of the "
    "paper's, the heads that its authors removed have a row of their own.",
    "The published claim is that worst-group accuracy rises by tens of points; the group accuracies are per image.",
)


def run(bench: Workbench) -> Result:
    """Measures the table."""
    test = bench.labelled("waterbirds")
    moments = test.collection.moments
    basis = moments.basis
    early = Terms.attention(basis, range(max(basis.layers - LATE_LAYERS, 0)))
    rest = Terms.of(basis, start=True) | Terms.all_mlps(basis) | early
    if bench.options.remove is not None:
        chosen: tuple[Chosen, ...] = ()
        heads = Terms.parse(bench.options.remove, basis)
        origin = "named with --remove"
    else:
        chosen = tuple(_by_words(bench))
        heads = terms_of(chosen, moments)
        origin = f"chosen by their texts, named from {bench.benchmark(bench.named_from('waterbirds')).name}"
    nothing = Removal("nothing", Terms.of(basis))
    removals = [
        nothing,
        Removal("MLPs and early layers", rest),
        Removal("chosen heads", heads, chosen),
        Removal("MLPs, early layers and chosen heads", rest | heads),
    ]
    published = HEADS.get(bench.name)
    if published is not None:
        theirs = Terms.parse(published, basis)
        removals.append(Removal("MLPs, early layers and the authors' heads", rest | theirs))
    accuracies = evaluate(test.batches(), test.classifier, moments, [removal.terms for removal in removals])
    base = accuracies[nothing.terms]
    rows = []
    for removal in removals:
        accuracy = accuracies[removal.terms]
        gain = rounded(accuracy.worst_group - base.worst_group)
        rows.append(row(removal, accuracy, test.groups.names) | {"gain": gain})
    notes = [] if heads else ["No head was chosen: no texts of a head name scenery or places often enough"]
    if base.near_chance:
        notes.append(f"The baseline is near chance ({base.chance:.1%}): check labels, names and weights")
    columns = (
        Column("accuracy", "accuracy"),
        Column("mean_of_groups", "mean of groups"),
        Column("worst_group", "worst group"),
        Column("gain", "gain of the worst group", "points"),
    )
    setup = bench.setup("waterbirds") | {"pool": bench.options.naming.pool}
    more = {"heads": str(heads), "origin": origin, "groups": dict(bench.benchmark("waterbirds").groups)}
    notes.append(f"Heads {origin}: {heads}")
    return Result(rows, columns, PROTOCOL, setup, notes, failed=test.collection.failed, more=more)


def _by_words(bench: Workbench) -> list[Chosen]:
    """Heads whose texts name scenery or places."""
    naming = bench.options.naming
    if naming.pool == RANDOM:
        raise InputError("Waterbirds needs texts to choose heads by: give another --pool than random, or --remove")
    words, texts = bench.options.words or WORDS, bench.pool(naming.pool)
    matches = matching(texts, words)
    if not matches:
        raise InputError(f"no text of the pool {naming.pool} contains any of {', '.join(words)}")
    moments = bench.moments(bench.named_from("waterbirds"))
    heads = chosen_heads(None, moments.basis, moments.layers)
    spans = moments.textspan(pool_features(bench.model, texts, naming), _TOP, heads)
    return by_texts(spans, matches, top=_TOP, at_least=_AT_LEAST)

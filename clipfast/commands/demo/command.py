"""``clipfast demo``: the bundled model on scenes that it draws, and on photographs.

Prints the sum check and what each picture's score is made of; writes a panel per picture with a map per text, and one
with a map per head for a scene's caption or a photograph's best text.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.commands import console
from clipfast.commands.demo.options import Options
from clipfast.commands.figures import draw_heads, draw_texts, write_panel
from clipfast.commands.loading import load_model
from clipfast.commands.options import parse_size
from clipfast.commands.outcome import FAILED
from clipfast.commands.results import prepare_results
from clipfast.commands.text_features import encode_texts
from clipfast.dataset.files import find_images
from clipfast.errors import ImageError, InputError
from clipfast.model import Model
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import TextShares, text_shares
from clipfast.scenes.captions import caption, phrase, prompts
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import BACKGROUNDS, SHAPES

SPLIT = "test"
"""Scenes that the bundled model has not been trained on."""


@dataclass(frozen=True)
class Subject:
    """A picture and what to look for in it.

    Attributes:
        name: what its panels are called.
        picture: the picture.
        texts: what to draw maps for.
        caption: the place of the text to take apart; None for the one with the highest score.
    """

    name: str
    picture: Image.Image
    texts: list[str]
    caption: int | None = None


def scene_subject(seed: int, index: int) -> Subject:
    """A drawn scene with its caption, single things that are true of it, and one that is not."""
    scene = sample_scene(seed, SPLIT, index)
    return Subject(f"scene-{index:02d}", Image.fromarray(render(scene)), _scene_texts(scene), 0)


def _scene_texts(scene: Scene) -> list[str]:
    rng = np.random.default_rng([scene.seed, scene.index])
    texts = [caption(scene, rng).text]
    for item, _ in scene.kinds:
        texts.append(phrase({"shape": item.shape, "colour": item.colour}, rng))
    texts.append(phrase({"texture": scene.kinds[0][0].texture}, rng))
    texts.append(phrase({"background": scene.background}, rng))
    shown = {item.shape for item in scene.objects}
    absent = [shape for shape in SHAPES if shape not in shown]
    texts.append(phrase({"shape": absent[int(rng.integers(len(absent)))]}, rng))
    return list(dict.fromkeys(texts))


def photo_texts() -> list[str]:
    """What to look for in a photograph: the bundled model knows little more of it than landscapes."""
    backgrounds = prompts("background")
    return [backgrounds[name][0] for name in BACKGROUNDS]


def run(options: Options) -> int:
    """Runs the demo; returns the exit code.

    Raises:
        ClipfastError: the folder cannot be written, or the bundled model is not there.
        OSError: a panel cannot be written.
    """
    if not options.scenes and not options.photos:
        raise InputError("nothing to show: give photographs, or --scenes above 0")
    image_size = parse_size(options.image_size)
    prepare_results(options.out)
    sources, missing, left_out = find_images(options.photos, skip=options.out)
    for gone in missing:
        console.error(gone.error)
    for note in left_out:
        console.note(note)
    failed = len(missing)
    model = load_model(options.model, None, None, image_size=image_size)
    subjects = [scene_subject(options.seed, index) for index in range(options.scenes)]
    for source in sources:
        try:
            name = source.name if not source.name.startswith("scene-") else f"photo-{source.name}"
            subjects.append(Subject(name, source.open(), photo_texts()))
        except ImageError as error:
            console.error(error)
            failed += 1
    check, rows = 0.0, []
    with console.progress("decomposing", len(subjects)) as advance:
        for subject in subjects:
            exact, shares = _show(model, subject, options.out)
            check = max(check, exact)
            rows.append(_row(subject.name, shares))
            advance(1)
    if rows:
        _print(model, rows, check)
        console.say(f"panels: {options.out}/NAME.png a map per text, {options.out}/heads/NAME.png a map per head")
    if failed:
        console.error(f"{failed} of {len(subjects) + failed - options.scenes} photographs failed")
    return FAILED if failed else 0


def _show(model: Model, subject: Subject, out: Path) -> tuple[float, TextShares]:
    """Decomposes one picture and writes its panels; returns the sum check and the parts of the score shown."""
    pixels = model.prepare([subject.picture])
    features = encode_texts(model, subject.texts)
    contributions = model.decompose(pixels, texts=features, maps="per_head")
    (picture,) = Denormalizer(model).pictures(pixels)
    shares = text_shares(contributions, features, subject.texts)[0]
    scores = [share.score for share in shares]
    main = max(range(len(scores)), key=scores.__getitem__) if subject.caption is None else subject.caption
    name = subject.name
    write_panel(draw_texts(name, picture, contributions, 0, subject.texts, scores), out / f"{name}.png")
    write_panel(draw_heads(name, picture, contributions, 0, shares[main], main), out / "heads" / f"{name}.png")
    return contributions.max_error(), shares[main]


def _row(name: str, shares: TextShares) -> list[str]:
    def part(value: float) -> str:
        share = shares.share(value)
        return f"{value:+.3f}" if share is None else f"{share:.0%}"

    return [
        name,
        shares.text,
        f"{shares.score:+.3f}",
        " ".join(part(value) for value in shares.attention),
        part(sum(shares.mlps) + shares.start),
        " ".join(f"{layer}.{head} {part(value)}" for layer, head, value in shares.top_heads(4)),
    ]


def _print(model: Model, rows: list[list[str]], check: float) -> None:
    tower = model.tower
    headers = ["picture", "text", "score", f"attention, layers 0-{tower.layers - 1}", "MLPs and start", "heads"]
    console.table(headers, rows, "What each score is made of (share of the score; heads are layer.head)")
    terms = tower.layers * tower.heads + tower.layers + 1
    console.say(f"sum check: the {terms} terms of every embedding add up to it within {check:.1e}")

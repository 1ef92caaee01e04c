"""The picture of an explanation: what is where, for any number of groups and characters."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.analyses.concepts import Decision, TextConcept, VisualConcept, VisualConcepts
from clipfast.analyses.explaining import Explanation
from clipfast.report.explanation import GAP, MARGIN, TILE, explanation_panel


def explanation(
    groups: int = 2, texts: int = 2, pool: tuple[str, ...] = ("red", "blue", "grün\n中 " + "long " * 60)
) -> Explanation:
    scores = torch.linspace(0.3, -0.1, groups, dtype=torch.float64)
    masks = torch.arange(8).view(2, 4) % groups
    found = tuple(
        VisualConcept(masks == group, float(scores[group]), ((0, 1, 0.2),), ((group % 3, 0.5), (2, 0.4)))
        for group in range(groups)
    )
    visual = VisualConcepts(found, torch.ones(2, 4, dtype=torch.float64), 0.01, -0.02)
    shared = tuple(TextConcept(text % 3, 0.4, text, 0.5, text, 0.1) for text in range(texts))
    decision = Decision(torch.tensor([0.3, 0.1]), 0, 1, torch.zeros(4), 0.2)
    return Explanation(("a cat", "a dog\udcff"), decision, torch.tensor([0.9, 0.1]), pool, shared, visual)


@pytest.mark.parametrize(("groups", "texts"), [(1, 0), (2, 2), (9, 12)])
def test_any_number_of_groups_and_texts(groups: int, texts: int) -> None:
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    drawn = explanation_panel("a\udcffb " * 80, picture, explanation(groups, texts))
    assert drawn.tobytes() == explanation_panel("a\udcffb " * 80, picture, explanation(groups, texts)).tobytes()
    assert drawn.width >= 3 * TILE


def test_a_group_shows_its_patches_and_fades_the_others() -> None:
    """A picture of one colour: inside the mask it is that colour, outside a light grey."""
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    drawn = np.asarray(explanation_panel("x", picture, explanation()))
    height = TILE // 2
    tops = [row for row in range(drawn.shape[0] - height) if tuple(drawn[row + 3, MARGIN + 3]) == (10, 200, 30)]
    top = next(row for row in tops if row > MARGIN + 30 + height)  # of the first group, below the picture itself
    cell = TILE // 4
    for column in range(4):
        for row in range(2):
            for group in range(2):
                x = MARGIN + group * (TILE + GAP) + column * cell + cell // 2
                pixel = tuple(int(level) for level in drawn[top + 3 + row * cell + cell // 2, x])
                if (row * 4 + column) % 2 == group:
                    assert pixel == (10, 200, 30)
                else:
                    assert len(set(pixel)) == 1
                    assert pixel[0] > 200

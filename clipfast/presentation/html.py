"""What a notebook shows of contributions: their tensors with axes, and a small picture of what the terms add."""

import base64
import io
from html import escape

from clipfast.contributions import Contributions
from clipfast.presentation.drawing import small

_MOST = 32
"""Images of the small picture: it is drawn whenever a cell ends with contributions, and must take no time."""


def image_tag(contributions: Contributions) -> str:
    """The small picture with a line below it; empty where there is nothing to draw."""
    part = contributions[:_MOST]
    if not len(part) or not part.layers or part.codes.device.type == "meta" or not bool(part.is_finite().all()):
        return ""
    file = io.BytesIO()
    small(part).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    first = f"the first {_MOST}" if len(contributions) > _MOST else "all"
    place = "the pooling" if part.depth == "pool" else "a row per layer, from the first"
    words = (
        f"What heads (columns) and, last, MLPs add to the embedding, mean of {first} images, {place}: "
        "orange adds, blue takes away."
    )
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{data}"/><br/>{escape(words)}</p>'

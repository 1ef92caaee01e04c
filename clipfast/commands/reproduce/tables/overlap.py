"""How alike the covariances of the heads' outputs are: the head-orthogonality matrix of the published code."""

import numpy as np
import torch

from clipfast.analyses.joint import head_overlaps
from clipfast.commands.heads import LATE_LAYERS
from clipfast.commands.reproduce.figures import write_matrix
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.report.shares import rounded

PROTOCOL = (
    "For any two heads the inner product of the covariances of their outputs over the product of their norms: 0 where "
    "they never vary along a common direction, 1 where their covariances are proportional.",
    "Only the published code has this matrix; there are no published numbers.",
)


def run(bench: Workbench) -> Result:
    """Measures the table and draws the matrix of the last four layers."""
    moments = bench.moments("imagenet")
    heads = moments.heads()
    overlaps = head_overlaps(moments).cpu()
    late = [place for place, (layer, _) in enumerate(heads) if layer in moments.layers[-LATE_LAYERS:]]
    own = torch.tensor(late)
    part = overlaps[own][:, own]
    rows = []
    for layer in moments.layers:
        inside = torch.tensor([place for place, (each, _) in enumerate(heads) if each == layer])
        block = overlaps[inside][:, inside]
        pairs = block[~torch.eye(len(block), dtype=torch.bool)]
        others = overlaps[inside][:, [place for place, (each, _) in enumerate(heads) if each != layer]]
        rows.append(
            {
                "name": f"layer {layer}",
                "within": rounded(float(pairs.mean())) if len(pairs) else None,
                "largest": rounded(float(pairs.max())) if len(pairs) else None,
                "others": rounded(float(others.mean())) if others.numel() else None,
            }
        )
    figure = "figures/overlap.png"
    note = f"heads of layers {moments.layers[-LATE_LAYERS:][0]} to {moments.layers[-1]}, in order: white 0, dark 1"
    write_matrix(bench.out / figure, "Overlap of heads", note, np.asarray(part.numpy()))
    columns = (
        Column("within", "mean within the layer", "number"),
        Column("largest", "largest within the layer", "number"),
        Column("others", "mean with other layers", "number"),
    )
    return Result(rows, columns, PROTOCOL, figures=[figure], failed=bench.collection("imagenet").failed)

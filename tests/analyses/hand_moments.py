"""Moments of outputs that a test writes down."""

import torch
from builders import vision_tower
from torch import Tensor

import clipfast
from clipfast.analyses.moments import Moments
from clipfast.basis import StoredBasis


def moments_of_outputs(outputs: list[Tensor]) -> Moments:
    """Moments of a model of one layer whose heads write exactly ``outputs``, ``[images, 4]`` each."""
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64, layers=1, heads=len(outputs), output_dim=4))
    images = torch.randn(len(outputs[0]), 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    contributions = model.decompose(images)
    basis = StoredBasis(
        torch.zeros(1, 4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64),
        len(outputs),
        "uniform",
        "by hand",
        {0: torch.eye(4, dtype=torch.float64).expand(len(outputs), 4, 4).contiguous()},
    )
    contributions.codes, contributions.basis = torch.stack(outputs, 1)[:, None].double(), basis
    moments = Moments()
    moments.update(contributions)
    return moments

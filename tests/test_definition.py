"""Model.decompose against the definition, over every shape of tower that is read."""

from copy import deepcopy
from functools import partial

import torch
from builders import directions, pixels, vision_tower
from definition import Definition, define
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measures import error, relative_error
from open_clip.transformer import QuickGELU
from tolerances import FLOAT32, FLOAT64
from torch import Tensor, nn

from clipfast import wrap

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": QuickGELU}
POOLINGS = (
    {"pool_type": "tok"},
    {"pool_type": "tok", "final_ln_after_pool": True},
    {"pool_type": "avg", "final_ln_after_pool": True},
)


@st.composite
def towers(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of a VisionTransformer with plain blocks."""
    head_dim = draw(st.sampled_from([8, 16, 20, 64]))
    heads = draw(st.integers(1, 2 if head_dim == 64 else 4))
    patch = draw(st.tuples(st.sampled_from([2, 3, 5]), st.sampled_from([2, 3, 5])))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    return {
        "image_size": (patch[0] * grid[0], patch[1] * grid[1]),
        "patch_size": patch,
        "width": heads * head_dim,
        "heads": heads,
        "layers": draw(st.integers(1, 4)),
        "mlp_ratio": draw(st.sampled_from([0.5, 2.0, 3.25])),
        "output_dim": draw(st.integers(8, 40)),
        "act_layer": ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))],
        "no_ln_pre": draw(st.booleans()),
        "ls_init_value": draw(st.sampled_from([None, 0.1])),
        "block_type": draw(st.sampled_from([None, "custom"])),
        "output_tokens": draw(st.booleans()),
        **draw(st.sampled_from(POOLINGS)),
    }


def subsets(layers: int) -> st.SearchStrategy[list[int] | None]:
    """No choice of layers, or any, named from either end, in any order."""
    return st.none() | st.lists(st.integers(-layers, layers - 1), max_size=layers)


def compare(
    visual: nn.Module, images: Tensor, texts: Tensor, expected: Definition, options: dict, limit: float
) -> None:
    layers = options["layers"]
    kept = (
        list(range(expected.tokens.shape[1]))
        if layers is None
        else sorted({i % expected.tokens.shape[1] for i in layers})
    )
    left_out = [layer for layer in range(expected.tokens.shape[1]) if layer not in kept]
    everything = {"attention": True, "tokens": True, "class_token": True, "texts": texts, **options}
    decompose = partial(wrap(visual).decompose, images, **everything)
    contributions = decompose(maps="per_head")

    assert contributions.layers == tuple(kept)
    assert relative_error(contributions.embedding, expected.embedding) <= limit
    assert relative_error(contributions.norm, expected.embedding.norm(dim=-1)) <= limit
    assert relative_error(contributions.std, expected.std) <= limit
    assert error(contributions.mean, expected.mean) <= limit * float(expected.std.max())
    assert error(contributions.attention, expected.attention[:, kept]) <= limit
    assert error(contributions.heads(), expected.heads[:, kept]) <= limit
    assert error(contributions.start, expected.start) <= limit
    assert error(contributions.mlps, expected.mlps) <= limit
    assert error(contributions.rest, expected.heads[:, left_out].sum((1, 2))) <= limit
    for layer in kept:
        assert error(contributions.tokens(layer), expected.tokens[:, layer]) <= limit
    assert error(contributions.class_token(), expected.tokens[:, kept, 0].sum(2)) <= limit
    assert contributions.max_error() <= limit

    per_head = torch.einsum("blnhd,td->blhnt", expected.tokens[:, kept], texts.double())
    assert error(contributions.maps, per_head) <= limit
    assert error(decompose(maps="summed").maps, per_head.sum((1, 2))) <= limit


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), shape=towers(), images=st.integers(1, 3), texts=st.integers(1, 5))
def test_every_term_is_the_defined_one(data: st.DataObject, shape: dict, images: int, texts: int) -> None:
    options = {
        "layers": data.draw(subsets(shape["layers"]), "layers"),
        "centring": data.draw(st.sampled_from(["uniform", "termwise"]), "centring"),
    }
    # Weights are drawn in float32, so that both precisions decompose the same numbers.
    single = vision_tower(seed=data.draw(st.integers(0, 99), "seed"), **shape)
    double = deepcopy(single).double()
    x, t = pixels(single, images), directions(texts, shape["output_dim"])
    expected = define(double, x.double(), options["centring"])
    compare(double, x.double(), t.double(), expected, options, FLOAT64)
    compare(single, x, t, expected, options, FLOAT32)


def test_the_definition_adds_up_to_the_modules_own_embedding() -> None:
    """The definition is code too: its terms must sum to what open_clip computes."""
    for pooling in POOLINGS:
        for centring in ("uniform", "termwise"):
            visual = vision_tower(dtype=torch.float64, ls_init_value=0.1, **pooling)
            expected = define(visual, pixels(visual, dtype=torch.float64), centring)
            total = expected.heads.sum((1, 2)) + expected.start + expected.mlps.sum(1)
            assert error(total, expected.embedding / expected.embedding.norm(dim=-1, keepdim=True)) <= FLOAT64

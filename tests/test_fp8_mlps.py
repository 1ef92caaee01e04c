"""MLPs in float8: what they compute, emulated on the CPU, and who is refused them."""

from dataclasses import replace

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error, relative_norm
from PIL import Image
from tolerances import SUM_BFLOAT16

import clipfast
from clipfast import InputError, Model, fp8, wrap
from clipfast.basis import fold
from clipfast.forward import Request, decompose
from clipfast.kernels import reference
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene
from clipfast.verification import FP8_TOLERANCE

LOW = torch.bfloat16
AVERAGE = {"pool_type": "avg", "final_ln_after_pool": True}
POOLING = pytest.mark.parametrize("changes", [{}, AVERAGE], ids=["class", "average"])


def scenes(**options: object) -> Model:
    return clipfast.load("scenes", device="cpu", dtype=LOW, backend="eager", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return scenes().prepare([Image.fromarray(render(sample_scene(0, "test", index))) for index in range(32)])


@pytest.mark.slow
def test_embeddings_of_scenes_are_nearly_the_same(drawn: torch.Tensor) -> None:
    model = scenes(precision="fp8")
    report = model.verify(drawn)
    assert report.ok
    assert report.tolerance == FP8_TOLERANCE
    assert 0.999 <= report.cosine < scenes().verify(drawn).cosine
    assert report.layers[-1] < 0.5 * min(report.layers[:-1])  # the last block is for one token, from its own weights
    contributions = model.decompose(drawn)
    assert contributions.max_error() <= SUM_BFLOAT16
    plain = scenes().decompose(drawn)
    assert 0 < relative_norm(contributions.heads(), plain.heads()) <= 0.1
    assert 0 < relative_norm(contributions.mlps, plain.mlps) <= 0.1


def test_it_is_never_chosen_by_itself(drawn: torch.Tensor) -> None:
    model = scenes()
    assert model.precision is None
    assert "fp8" not in repr(model)
    asked = scenes(precision=None)
    assert torch.equal(model.decompose(drawn[:2]).embedding, asked.decompose(drawn[:2]).embedding)
    assert "bfloat16, MLPs in fp8" in repr(scenes(precision="fp8"))


@torch.no_grad()
def test_an_mlp_is_two_products_of_rounded_rows() -> None:
    """By the definition in float64, but for three roundings to 8 bits of mantissa."""
    block = wrap(vision_tower(dtype=LOW)).tower.blocks[0]
    normed = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0)).to(LOW)
    mlp = fp8.Mlp(
        *reference.quantize_rows(block.mlp_in_weight.float()), *reference.quantize_rows(block.mlp_out_weight.float())
    )
    have = fp8.feed_forward(normed, block, mlp, "gelu", "eager")

    def multiplied(rows: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        bits, row_scale = reference.quantize_rows(rows)
        return reference.scaled_linear(bits, row_scale, values, scale.double(), bias.double())

    hidden = multiplied(normed.double(), mlp.in_values, mlp.in_scale, block.mlp_in_bias)
    hidden = reference.activated(hidden.to(LOW).double(), "gelu")
    expected = multiplied(hidden, mlp.out_values, mlp.out_scale, block.mlp_out_bias)
    assert have.dtype == LOW
    assert relative_norm(have, expected) <= 2**-8
    exact = reference.linear_activation(
        normed.double(), block.mlp_in_weight.double(), block.mlp_in_bias.double(), "gelu"
    )
    exact = reference.linear(exact, block.mlp_out_weight.double(), block.mlp_out_bias.double())
    assert 2**-7 <= relative_norm(have, exact) <= 2**-4


@POOLING
def test_terms_sum_to_the_embedding(changes: dict[str, object]) -> None:
    visual = vision_tower(dtype=LOW, **changes)
    model = wrap(visual, backend="eager", precision="fp8")
    images = pixels(visual, 4, dtype=LOW)
    contributions = model.decompose(images, texts=directions(3, 20, dtype=LOW), attention=True)
    assert contributions.max_error() <= SUM_BFLOAT16
    plain = wrap(visual, backend="eager").decompose(images)
    assert relative_norm(contributions.embedding, plain.embedding) <= 0.1
    assert not torch.equal(contributions.mlps, plain.mlps)


@POOLING
def test_attention_adds_itself_beside_them(changes: dict[str, object]) -> None:
    """As on a GPU: biases of the attention are carried past the stream, those of the MLPs are in their products."""
    visual = vision_tower(dtype=LOW, **changes)
    tower, images = wrap(visual).tower, pixels(visual, 4, dtype=LOW)
    request = Request((0, 1, 2), backend="eager", mlps=fp8.quantize(tower, "eager"), adds_products=False)
    apart, added = (
        decompose(tower, images, replace(request, adds_products=adds), fold(tower, "uniform")) for adds in (False, True)
    )
    assert added.max_error() <= SUM_BFLOAT16
    assert relative_norm(added.embedding, apart.embedding) <= 5e-2
    assert relative_norm(added.mlps, apart.mlps) <= 5e-2


def test_a_layer_scale_multiplies_them() -> None:
    visual = vision_tower(dtype=LOW, ls_init_value=0.5)
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.ls_2.gamma.zero_()
    images = pixels(visual, dtype=LOW)
    have = wrap(visual, backend="eager", precision="fp8").decompose(images)
    assert error(have.embedding, wrap(visual, backend="eager").decompose(images).embedding) == 0


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "replaced"])
def test_weights_that_change_are_rounded_again(replaced: bool) -> None:
    visual = vision_tower(dtype=LOW)
    model, images = wrap(visual, backend="eager", precision="fp8"), pixels(visual, dtype=LOW)
    before = model.decompose(images).embedding
    with torch.no_grad():
        weight = visual.transformer.resblocks[0].mlp.c_proj.weight
        if replaced:
            visual.transformer.resblocks[0].mlp.c_proj.weight = torch.nn.Parameter(weight * 2)
        else:
            weight.mul_(2)
    after = model.decompose(images).embedding
    assert not torch.equal(after, before)
    assert torch.equal(after, wrap(visual, backend="eager", precision="fp8").decompose(images).embedding)


def test_compiled_calls_give_the_same() -> None:
    torch._dynamo.reset()
    visual = vision_tower(dtype=LOW)
    model, images = wrap(visual, backend="eager", precision="fp8"), pixels(visual, dtype=LOW)
    compiled = torch.compile(lambda images: model.decompose(images).mlps, fullgraph=True, backend="aot_eager")
    assert relative_norm(compiled(images), model.decompose(images).mlps) <= 2**-8


@pytest.mark.parametrize(
    ("dtype", "options", "told"),
    [
        (LOW, {"backend": "auto"}, "the model is on cpu: only backend='eager' emulates it on a CPU, slowly"),
        (LOW, {"backend": "native"}, "the model is on cpu: only backend='eager' emulates it on a CPU, slowly"),
        (torch.float32, {}, "the weights are float32: load them in bfloat16"),
        (torch.float16, {}, "the weights are float16: load them in bfloat16"),
        (
            torch.float32,
            {"backend": "auto"},
            "the model is on cpu: only backend='eager' emulates it on a CPU, slowly; "
            "the weights are float32: load them in bfloat16",
        ),
        (LOW, {"mlp_ratio": 2.25}, r"an MLP of \[72, 32\] has sizes that are no multiples of 16"),
    ],
)
def test_it_is_refused_with_every_reason(dtype: torch.dtype, options: dict[str, object], told: str) -> None:
    sizes = {name: options[name] for name in options if name != "backend"}
    visual = vision_tower(dtype=dtype, **sizes)
    with pytest.raises(InputError, match=f"^precision='fp8' is not possible here: {told}$"):
        wrap(visual, precision="fp8", backend=str(options.get("backend", "eager")))


def test_a_precision_that_does_not_exist() -> None:
    with pytest.raises(InputError, match=r"^precision is 'fp4': choose 'fp8', or None for that of the weights$"):
        wrap(vision_tower(dtype=LOW), precision="fp4")  # type: ignore[arg-type]


def test_a_model_that_is_converted_later_is_refused_then() -> None:
    visual = vision_tower(dtype=LOW)
    model = wrap(visual, precision="fp8", backend="eager")
    model.decompose(pixels(visual, dtype=LOW))
    visual.float()
    with pytest.raises(InputError, match="the weights are float32: load them in bfloat16"):
        model.decompose(pixels(visual))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the products are emulated")
def test_a_gpu_computes_what_the_cpu_emulates(drawn: torch.Tensor) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no products of float8 with scales by row")
    on_gpu = clipfast.load("scenes", device="cuda", dtype=LOW, precision="fp8")
    have, expected = on_gpu.decompose(drawn.cuda()), scenes(precision="fp8").decompose(drawn)
    assert on_gpu.verify(drawn.cuda()).cosine >= 0.999
    assert relative_norm(have.embedding.cpu(), expected.embedding) <= 3e-2

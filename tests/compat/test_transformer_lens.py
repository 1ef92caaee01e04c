"""Names, stacks and labels of a cache against forward hooks on the running modules."""

import pytest
import timm
import torch
from builders import clip_model, directions, pixels, randomise, vision_tower
from hooks import CASES, TIMM, Case
from measures import error, relative_error
from open_clip.modified_resnet import ModifiedResNet
from tolerances import EMBEDDING_FLOAT32, FLOAT64, OP_FLOAT32, SUM_BFLOAT16

import clipfast
from clipfast.compat.transformer_lens import ActivationCache, UnknownName, act_name, run_with_cache
from clipfast.errors import InputError

IMAGES = 2
TEXTS = directions(3, 20, dtype=torch.float64)
POOLED = [name for name in CASES if name != "timm, SigLIP"]


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, torch.Tensor]:
    case = CASES[name](dtype)
    size = getattr(case.module, "image_size", (24, 24))
    generator = torch.Generator().manual_seed(1)
    return case, torch.randn(IMAGES, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def pooled(name: str, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The row that the embedding reads."""
    return x.narrow(dim, 1, x.shape[dim] - 1).mean(dim) if name.endswith("mean") else x.select(dim, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, EMBEDDING_FLOAT32)])
@pytest.mark.parametrize("name", CASES)
def test_every_name_is_what_hooks_record(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case, images = made(name, dtype)
    embedding, expected = case.record(images)
    own, cache = run_with_cache(case.module, images)
    assert relative_error(own, embedding) <= tolerance
    assert set(cache) == {key for key in expected if not key.endswith("hook_result")}
    for key, value in expected.items():
        assert relative_error(cache[key], value) <= tolerance, key


def test_a_plain_module_and_a_model_give_the_same() -> None:
    case, images = made("open_clip, gelu")
    model = clipfast.wrap(case.module)
    for (one, first), (other, second) in [(run_with_cache(case.module, images), run_with_cache(model, images))]:
        assert torch.equal(one, other)
        assert torch.equal(first["z", 1], second["z", 1])


# ------------------------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_stream(name: str) -> None:
    case, images = made(name)
    _, expected = case.record(images)
    _, cache = run_with_cache(case.module, images)
    for layer, target in ((None, "blocks.2.hook_resid_post"), (1, "blocks.1.hook_resid_pre")):
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        assert len(stack) == len(labels)
        assert error(stack.sum(0), expected[target]) <= FLOAT64
        whole, labels = cache.get_full_resid_decomposition(layer, return_labels=True)
        assert len(whole) == len(labels)
        assert error(whole.sum(0), expected[target]) <= FLOAT64
        heads = cache.stack_head_results(-1 if layer is None else layer, incl_remainder=True)
        assert error(heads.sum(0), expected[target]) <= FLOAT64
    middle = cache.decompose_resid(1, mlp_input=True)
    assert error(middle.sum(0), expected["blocks.1.hook_resid_mid"]) <= FLOAT64
    middle = cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=False)
    assert error(middle.sum(0), expected["blocks.1.hook_resid_mid"]) <= FLOAT64


@pytest.mark.parametrize("name", POOLED)
def test_the_pooled_row_is_that_of_all_tokens(name: str) -> None:
    """Also where it comes from codes: nothing of all tokens is computed."""
    case, images = made(name)
    _, expected = case.record(images)
    _, cache = run_with_cache(case.module, images)
    rows = {
        "heads": cache.stack_head_results(pos_slice="pooled", incl_remainder=True),
        "parts": cache.decompose_resid(pos_slice="pooled", incl_embeds=False),
        "states": cache.accumulated_resid(pos_slice="pooled", incl_mid=True),
    }
    assert "stream" not in vars(cache._all)
    stacks = {
        "heads": cache.stack_head_results(incl_remainder=True),
        "parts": cache.decompose_resid(incl_embeds=False),
        "states": cache.accumulated_resid(incl_mid=True),
    }
    for kind, stack in stacks.items():
        assert error(rows[kind], pooled(name, stack, 2)) <= FLOAT64, kind
    for layer in range(3):
        for head in range(2):
            result = pooled(name, expected[f"blocks.{layer}.attn.hook_result"])[:, head]
            assert error(cache.head_result(layer, head), result) <= FLOAT64
    full, whole = (cache.get_full_resid_decomposition(pos_slice=where) for where in ("pooled", None))
    assert error(full, pooled(name, whole, 2)) <= FLOAT64
    start = cache.decompose_resid(pos_slice="pooled")
    assert error(start, pooled(name, cache.decompose_resid(), 2)) <= FLOAT64


def test_the_class_token_is_the_pooled_row_and_other_positions_are_not() -> None:
    case, images = made("open_clip, layer scale")
    _, cache = run_with_cache(case.module, images)
    row = cache.stack_head_results(pos_slice=0)
    assert torch.equal(row, cache.stack_head_results(pos_slice="pooled"))
    assert torch.equal(row, cache.stack_head_results(pos_slice=-10))
    assert "stream" not in vars(cache._all)
    every = cache.stack_head_results()
    assert every.shape == (6, IMAGES, 10, 32)
    for where, chosen in ((3, every[:, :, 3]), ((1, 4), every[:, :, 1:4]), ([2, 0], every[:, :, [2, 0]])):
        assert error(cache.stack_head_results(pos_slice=where), chosen) <= FLOAT64
    assert error(cache.head_result(1, 1, pos_slice=[4]), every[3][:, [4]]) <= FLOAT64


def test_labels_are_those_of_transformer_lens() -> None:
    case, images = made("timm, SigLIP")
    _, cache = run_with_cache(case.module, images)
    assert cache.decompose_resid(2, return_labels=True)[1] == [
        *("embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out")
    ]
    assert cache.decompose_resid(1, mlp_input=True, mode="attn", return_labels=True)[1] == [
        *("embed", "pos_embed", "0_attn_out", "1_attn_out")
    ]
    assert cache.decompose_resid(mode="mlp", incl_embeds=False, return_labels=True)[1] == [
        *("0_mlp_out", "1_mlp_out", "2_mlp_out")
    ]
    states = ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert cache.accumulated_resid(incl_mid=True, return_labels=True)[1] == states
    assert cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1] == ["0_pre", "1_pre", "1_mid"]
    heads = ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert cache.stack_head_results(2, return_labels=True, incl_remainder=True)[1] == [*heads, "remainder"]
    assert cache.stack_head_results(return_labels=True, heads=[(-1, 1), (0, 0)])[1] == ["L2H1", "L0H0"]
    full = cache.get_full_resid_decomposition(1, expand_neurons=False, return_labels=True)[1]
    assert full == ["L0H0", "L0H1", "0_mlp_out", "embed", "pos_embed", "bias"]
    neurons = cache.get_full_resid_decomposition(1, return_labels=True)[1]
    assert neurons[2:4] + neurons[-4:] == ["L0N0", "L0N1", "L0N127", "embed", "pos_embed", "bias"]
    case, images = made("open_clip, gelu")
    _, cache = run_with_cache(case.module, images)
    assert cache.decompose_resid(0, return_labels=True)[1] == ["ln_pre"]
    assert cache.stack_head_results(0).shape == (0, IMAGES, 7, 32)


@pytest.mark.parametrize("name", POOLED)
def test_attributions_and_the_constant_are_the_cosine(name: str) -> None:
    case, images = made(name)
    embedding, cache = run_with_cache(case.module, images)
    cosine = embedding @ TEXTS.T / embedding.norm(dim=1, keepdim=True)
    for stack in (
        cache.decompose_resid(pos_slice="pooled"),
        cache.get_full_resid_decomposition(pos_slice="pooled", expand_neurons=False),
    ):
        parts = cache.logit_attrs(stack, TEXTS, pos_slice="pooled")
        assert parts.shape == (len(stack), IMAGES, 3)
        assert error(parts.sum(0) + cache.logit_constant(TEXTS), cosine) <= FLOAT64
        one = cache.logit_attrs(stack, TEXTS[0], TEXTS[1], pos_slice="pooled")
        assert error(one, parts[..., 0] - parts[..., 1]) <= FLOAT64
        assert error(one.sum(0) + cache.logit_constant(TEXTS[0], TEXTS[1]), cosine[:, 0] - cosine[:, 1]) <= FLOAT64
    every = cache.decompose_resid()
    tokens = cache.logit_attrs(every, TEXTS)
    assert tokens.shape == (*every.shape[:3], 3)
    row = cache.logit_attrs(cache.decompose_resid(pos_slice="pooled"), TEXTS, pos_slice="pooled")
    assert error(pooled(name, tokens, 2), row) <= FLOAT64


def test_heads_have_the_scores_of_a_decomposition() -> None:
    """The decomposition spreads its constants over the terms: without them, head by head."""
    case, images = made("open_clip, layer scale")
    model = clipfast.wrap(case.module)
    _, cache = run_with_cache(model, images)
    stack = cache.stack_head_results(pos_slice=0)
    scores = cache.logit_attrs(stack, TEXTS, pos_slice=0).unflatten(0, (3, 2))
    decomposed = model.decompose(images, centring="termwise")
    basis = decomposed.basis.towards(TEXTS)
    shared = (
        basis.constants(decomposed.mean, decomposed.std, range(3)) / (decomposed.std * decomposed.norm)[:, None, None]
    )
    expected = decomposed.scores(TEXTS).heads - shared[:, :, None]
    assert error(scores.movedim(2, 0), expected) <= FLOAT64


def test_layer_norms_of_stacks() -> None:
    case, images = made("open_clip, gelu")
    _, expected = case.record(images)
    _, cache = run_with_cache(case.module, images)
    for layer, mlp_input, key in ((1, False, "blocks.1.ln1"), (1, True, "blocks.1.ln2"), (None, False, "ln_final")):
        stack = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        target = "hook_resid_mid" if mlp_input else "hook_resid_pre"
        x = expected["blocks.2.hook_resid_post"] if layer is None else expected[f"blocks.{layer}.{target}"]
        assert error(stack.sum(0), (x - x.mean(-1, keepdim=True)) / expected[f"{key}.hook_scale"]) <= FLOAT64
        row = cache.decompose_resid(layer, mlp_input, apply_ln=True, pos_slice=0)
        assert error(row, stack[:, :, 0]) <= FLOAT64
    lens = cache.accumulated_resid(apply_ln=True, pos_slice=0)
    assert error(lens[-1] @ case.module.proj, cache.embedding) <= FLOAT64
    assert error(lens[1], case.module.ln_post(expected["blocks.1.hook_resid_pre"][:, 0])) <= FLOAT64


# ------------------------------------------------------------------------------------------- towers with more in them


@pytest.mark.parametrize("kind", ["rotary", "norms of queries and keys", "norms after", "gated"])
def test_towers_beyond_clip_add_up(kind: str) -> None:
    eva = timm.models.eva.Eva
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (3, 3), "qkv_fused": False}
    build = {
        "rotary": lambda: eva(**TIMM, num_classes=20, global_pool="token", scale_attn_inner=True, **rotary),
        "norms after": lambda: eva(**TIMM, num_classes=20, global_pool="token", use_post_norm=True),
        "gated": lambda: eva(**TIMM, num_classes=20, global_pool="token", swiglu_mlp=True, scale_mlp=True),
        "norms of queries and keys": lambda: timm.models.vision_transformer.VisionTransformer(
            **TIMM, num_classes=20, global_pool="avg", reg_tokens=2, class_token=False, qk_norm=True
        ),
    }
    model = randomise(build[kind](), 4).double().eval()
    images = torch.randn(IMAGES, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kept = {}
    handle = model.blocks[-1].register_forward_hook(lambda _module, _args, out: kept.update(last=out))
    queries = {}
    other = model.blocks[1].norm1.register_forward_hook(lambda _module, _args, out: queries.update(read=out))
    with torch.no_grad():
        embedding = model(images)
    handle.remove()
    other.remove()
    own, cache = run_with_cache(model, images)
    assert error(own, embedding) <= FLOAT64
    assert error(cache["resid_post", -1], kept["last"]) <= FLOAT64
    every = cache.get_full_resid_decomposition(expand_neurons=False)
    assert error(every.sum(0), kept["last"]) <= FLOAT64
    row = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice="pooled")
    assert (
        error(row.sum(0), kept["last"][:, 0] if kind != "norms of queries and keys" else kept["last"][:, 2:].mean(1))
        <= FLOAT64
    )
    if kind != "norms after":
        assert error(row, every[:, :, 0] if kind != "norms of queries and keys" else every[:, :, 2:].mean(2)) <= FLOAT64
        assert error(cache["normalized", 1, "ln1"], queries["read"]) <= FLOAT64
    if kind == "rotary":
        query = torch.nn.functional.linear(queries["read"], model.blocks[1].attn.q_proj.weight)
        bias = (
            model.blocks[1].attn.q_bias
            if model.blocks[1].attn.q_proj.bias is None
            else model.blocks[1].attn.q_proj.bias
        )
        assert error(cache["q", 1], (query + bias).unflatten(-1, (2, -1))) <= FLOAT64
        assert error(cache["rot_q", 1], cache["q", 1]) > 1e-3
        assert error(cache["rot_q", 1].norm(dim=-1), cache["q", 1].norm(dim=-1)) <= OP_FLOAT32  # as its angles are
    if kind == "gated":
        pre, linear = cache["pre", 0], cache["pre_linear", 0]
        assert error(model.blocks[0].mlp.norm(torch.nn.functional.silu(pre) * linear), cache["post", 0]) <= FLOAT64
    if kind == "norms after":
        with pytest.raises(InputError, match="ask with expand_neurons=False"):
            cache.get_full_resid_decomposition()
        with pytest.raises(UnknownName, match="no norm comes before"):
            cache["scale", 0, "ln1"]


def test_bfloat16_and_autocast() -> None:
    case, images = made("open_clip, gelu")
    _, expected = case.record(images)
    visual = case.module.to(torch.bfloat16)
    _, cache = run_with_cache(visual, images.bfloat16())
    for key in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern", "blocks.0.mlp.hook_post"):
        assert relative_error(cache[key].double(), expected[key]) <= SUM_BFLOAT16 * 2
    stack = cache.get_full_resid_decomposition(pos_slice=0, expand_neurons=False)
    assert relative_error(stack.sum(0).double(), expected["blocks.2.hook_resid_post"][:, 0]) <= SUM_BFLOAT16 * 2
    visual = case.module.float()
    _, plain = run_with_cache(visual, images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cast = run_with_cache(visual, images.float())
        assert torch.equal(cast["blocks.1.hook_mlp_out"], plain["blocks.1.hook_mlp_out"])
        assert torch.equal(cast.stack_head_results(pos_slice=0), plain.stack_head_results(pos_slice=0))


# --------------------------------------------------------------------------------------------------------------- names


def test_short_names() -> None:
    for short, whole in {
        ("k", 6): "blocks.6.attn.hook_k",
        ("k6",): "blocks.6.attn.hook_k",
        ("scale", 4, "ln1"): "blocks.4.ln1.hook_scale",
        ("scale4ln1",): "blocks.4.ln1.hook_scale",
        ("normalized", 27, "ln2"): "blocks.27.ln2.hook_normalized",
        ("pre", 2): "blocks.2.mlp.hook_pre",
        ("pre5",): "blocks.5.mlp.hook_pre",
        ("attn", 3): "blocks.3.attn.hook_pattern",
        ("resid_pre", 0): "blocks.0.hook_resid_pre",
        ("result", 1, "attn"): "blocks.1.attn.hook_result",
        ("embed",): "hook_embed",
        ("scale",): "ln_final.hook_scale",
        ("blocks.1.hook_resid_mid",): "blocks.1.hook_resid_mid",
    }.items():
        assert act_name(*short) == whole


def test_a_cache_is_a_mapping() -> None:
    case, images = made("open_clip, gelu")
    _, cache = run_with_cache(case.module, images)
    assert len(cache) == len(list(cache)) == len(dict(cache)) == 6 + 3 * 17 + 2
    assert ("pattern", 2) in cache
    assert "blocks.0.attn.hook_result" in cache
    assert "blocks.0.attn.hook_result" not in list(cache)
    assert "blocks.3.hook_resid_pre" not in cache
    assert 3 not in cache
    assert cache.get("hook_nothing") is None
    assert torch.equal(cache["pattern", -1], cache["blocks.2.attn.hook_pattern"])


@pytest.mark.parametrize(
    ("names_filter", "names"),
    [
        ("blocks.1.hook_mlp_out", ["blocks.1.hook_mlp_out"]),
        (["z2", "hook_embed"], ["hook_embed", "blocks.2.attn.hook_z"]),
        (lambda name: name.endswith("hook_result"), [f"blocks.{layer}.attn.hook_result" for layer in range(3)]),
    ],
)
def test_a_filter_chooses_names(names_filter: object, names: list[str]) -> None:
    case, images = made("open_clip, gelu")
    _, cache = run_with_cache(case.module, images, names_filter)
    assert list(cache) == names
    with pytest.raises(UnknownName, match="was left out by names_filter"):
        cache["blocks.0.hook_resid_pre"]
    assert cache.stack_head_results(pos_slice=0).shape == (6, IMAGES, 32)


def test_strings_are_texts() -> None:
    model = clipfast.wrap(clip_model().double())
    images = pixels(model.module.visual, dtype=torch.float64)
    _, cache = run_with_cache(model, images)
    stack = cache.decompose_resid(pos_slice=0)
    texts = ["a red star", "a forest"]
    both = cache.logit_attrs(stack, texts, pos_slice=0)
    assert error(both, cache.logit_attrs(stack, model.encode_text(texts), pos_slice=0)) <= FLOAT64
    assert error(cache.logit_attrs(stack, texts[1], pos_slice=0), both[..., 1]) <= FLOAT64


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    case, images = made("open_clip, gelu")
    return run_with_cache(case.module, images)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c["blocks.3.hook_resid_pre"], r"blocks\.3\.hook_resid_pre: layers are 0 to 2"),
        (lambda c: c["pattern", 3], "layer 3 does not exist"),
        (lambda c: c["hook_nothing"], "there is no activation 'hook_nothing'"),
        (lambda c: c["rot_q", 0], "no rotary positions"),
        (lambda c: c["pre_linear", 0], "is not gated"),
        (lambda c: c[()], r"\(\) is no name"),
        (lambda c: c.head_result(0, 2), "head 2 does not exist"),
        (lambda c: c.head_result(0, 0, "cls"), "pos_slice is 'cls': give positions, or 'pooled'"),
        (lambda c: c.head_result(0, 0, 7), "pos_slice is 7: tokens are 0 to 6"),
        (lambda c: c.stack_head_results(1, heads=[(1, 0)]), "L1H0 is not before layer 1"),
        (lambda c: c.decompose_resid(mode="heads"), "mode is 'heads': choose 'all', 'mlp' or 'attn'"),
        (lambda c: c.decompose_resid(0, incl_embeds=False), "nothing is before layer 0"),
        (lambda c: c.decompose_resid(mlp_input=True), "mlp_input needs a layer"),
        (lambda c: c.logit_attrs(c.decompose_resid(), TEXTS, pos_slice=0), r"was not made with pos_slice=0"),
        (lambda c: c.logit_attrs(c.decompose_resid(), TEXTS[:, :3]), "texts has shape"),
        (lambda c: c.logit_attrs(c.decompose_resid(), TEXTS, TEXTS[0]), "give as many"),
        (lambda c: c.keep("hook_nothing"), "there is no activation"),
        (lambda c: c.keep(lambda name: False), "names_filter leaves no name"),
    ],
)
def test_bad_input_is_one_line(cache: ActivationCache, call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call(cache)
    assert "\n" not in str(raised.value)


def test_rows_that_a_tower_has_not() -> None:
    case, images = made("timm, SigLIP")
    _, cache = run_with_cache(case.module, images)
    with pytest.raises(InputError, match="no row is pooled"):
        cache.head_result(0, 0)
    with pytest.raises(InputError, match="an attention pool reads all tokens"):
        cache.logit_attrs(cache.decompose_resid(), torch.ones(32, dtype=torch.float64))
    with pytest.raises(UnknownName, match="no norm before its first block"):
        cache["hook_ln_pre"]
    assert cache.head_result(0, 0, pos_slice=0).shape == (IMAGES, 32)
    case, images = made("open_clip, mean")
    _, cache = run_with_cache(case.module, images)
    with pytest.raises(InputError, match="no scale of their mean"):
        cache.decompose_resid(1, apply_ln=True, pos_slice="pooled")


def test_weights_that_change_are_noticed() -> None:
    visual = vision_tower()
    _, cache = run_with_cache(visual, pixels(visual))
    head = cache.head_result(0, 0)
    with torch.no_grad():
        visual.ln_post.weight += 1
    with pytest.raises(InputError, match="the weights have changed"):
        cache["hook_embed"]
    assert torch.equal(cache.head_result(0, 0), head)  # reads the output projection alone
    with torch.no_grad():
        visual.transformer.resblocks[0].attn.out_proj.weight += 1
    with pytest.raises(InputError, match="the weights have changed"):
        cache.head_result(0, 0)


def test_a_network_without_blocks_is_refused() -> None:
    network = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=20, heads=2, image_size=32, width=8)
    with pytest.raises(InputError, match="no transformer blocks"):
        run_with_cache(randomise(network, 0).eval(), torch.zeros(1, 3, 32, 32))

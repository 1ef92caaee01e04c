"""Every kernel at realistic sizes, as launches of ``meta`` tensors that :mod:`benchmarks.compiled` compiles.

Sizes are those of open_clip's vision transformers at batch 256; configurations are those that each operation
times on a GPU of the given capability.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.kernels.attention import kernel as attention
from clipfast.kernels.attention import sdpa, tiles
from clipfast.kernels.fp8 import triton as fp8
from clipfast.kernels.launch import Launch
from clipfast.kernels.layer_norm import triton as layer_norm
from clipfast.kernels.linear import triton as linear
from clipfast.kernels.moments import triton as moments
from clipfast.kernels.query_row import triton as query_row
from clipfast.kernels.query_row import triton_from_tokens as query_row_from_tokens
from clipfast.kernels.reference import Activation
from clipfast.kernels.rotate import triton as rotate
from clipfast.kernels.span import triton as span
from clipfast.kernels.text_maps import triton as text_maps
from clipfast.kernels.token_contributions import triton as token_contributions
from clipfast.kernels.weighted_rows import triton as weighted_rows

IMAGES = 256
LOW, FULL = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Specimen:
    """One launch to compile.

    Attributes:
        operation: its name in :mod:`clipfast.kernels.ops`.
        case: sizes and dtype, in words.
        launch: the launch.
        products: whether the binary must use tensor cores.
    """

    operation: str
    case: str
    launch: Launch
    products: bool


def _meta(*shape: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def specimens(capability: int) -> Iterator[Specimen]:
    """All specimens for a GPU of this capability."""
    yield from _attention(capability)
    yield from _weighted_rows()
    yield from _query_row()
    yield from _query_row_from_tokens()
    yield from _text_maps(capability)
    yield from _token_contributions(capability)
    yield from _layers(capability)
    yield from _fp8(capability)
    yield from _heads(capability)


def _attention(capability: int) -> Iterator[Specimen]:
    # head_dim: 64 in B and L, 80 in H/14, 88 in g, 104 in bigG. At 257 (and 577) tokens the class token is split off.
    cases = [(tokens, 64, LOW) for tokens in (50, 197, 257)]
    cases += [(257, head_dim, LOW) for head_dim in (80, 88, 96, 104, 128)]
    cases += [(197, 80, LOW), (257, 64, torch.float16), (257, 64, FULL), (197, 64, FULL), (257, 80, FULL)]
    for tokens, head_dim, dtype in cases:
        qkv = _meta(IMAGES, tokens, 3, 16, head_dim, dtype=dtype)
        for config in tiles.configs(qkv, capability):
            launches, _, _ = attention.plan(qkv, "cls", config)
            for launch in launches:
                yield Specimen("attention", f"N={tokens} E={head_dim} {_name(dtype)}", launch, dtype != FULL)
    for head_dim in (64, 80):
        qkv = _meta(IMAGES, 257, 3, 16, head_dim)
        launches, _, _ = attention.plan(qkv, "mean", tiles.configs(qkv, capability)[0])
        for launch in launches:
            yield Specimen("attention", f"N=257 E={head_dim} bf16, mean row", launch, True)
        launch, _ = sdpa.plan_mean(_meta(IMAGES, 197, 3, 16, head_dim), _meta(IMAGES, 16, 197, dtype=FULL))
        yield Specimen("attention", f"N=197 E={head_dim} bf16, mean row from logarithms", launch, True)


def _weighted_rows() -> Iterator[Specimen]:
    # 12 pooling heads of SigLIP B/16, 16 of SO400M, whose heads are 72 wide.
    cases = [(196, 64, 12, LOW), (729, 72, 16, LOW), (196, 160, 12, LOW), (196, 64, 12, torch.float16)]
    for tokens, head_dim, groups, dtype in [*cases, (196, 64, 12, FULL)]:
        qkv, weights = _meta(IMAGES, tokens, 3, 12, head_dim, dtype=dtype), _meta(IMAGES, groups, tokens, dtype=FULL)
        for config in weighted_rows.configs(qkv):
            launches, _ = weighted_rows.plan(qkv, weights, config)
            for launch in launches:
                case = f"N={tokens} E={head_dim} G={groups} {_name(dtype)}"
                yield Specimen("weighted_rows", case, launch, dtype != FULL)


def _query_row() -> Iterator[Specimen]:
    for head_dim in (64, 80, 104):
        query = _meta(IMAGES, 16, head_dim)
        qkv = _meta(IMAGES, 257, 3, 16, head_dim)
        for config in query_row.CONFIGS:
            launch, _, _ = query_row.plan(query, qkv[:, :, 1], qkv[:, :, 2], config)
            yield Specimen("query_row", f"E={head_dim} bf16", launch, False)
    qkv = _meta(IMAGES, 257, 3, 16, 64)
    launch, _, _ = query_row.plan(qkv[:, 0, 0], qkv[:, :, 1], None, query_row.CONFIGS[0])
    yield Specimen("query_row", "E=64 bf16, alpha alone", launch, False)


def _query_row_from_tokens() -> Iterator[Specimen]:
    for dtype in (LOW, torch.float16, FULL):
        tokens, folded = _meta(IMAGES, 257, 1024, dtype=dtype), _meta(IMAGES, 16, 1024, dtype=FULL)
        alpha, mixed = _meta(IMAGES, 16, 257, dtype=FULL), _meta(IMAGES, 16, 1024, dtype=FULL)
        for cut in query_row_from_tokens.cuts(tokens):
            for launch in query_row_from_tokens.plan(folded, tokens, alpha, mixed, cut):
                yield Specimen("query_row_from_tokens", f"W=1024 H=16 {_name(dtype)}", launch, dtype == LOW)


def _weighted(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    value = _meta(IMAGES, 257, 3, 16, head_dim, dtype=dtype)[:, :, 2]
    return _meta(IMAGES, 16, 257, dtype=FULL), value


def _text_maps(capability: int) -> Iterator[Specimen]:
    cases = [(64, texts, LOW) for texts in (1, 16, 100, 1000)]
    cases += [(head_dim, 100, LOW) for head_dim in (80, 88, 96, 104, 128)]
    cases += [(64, 100, torch.float16), (64, 100, FULL), (80, 100, FULL), (64, 1, FULL)]
    for head_dim, texts, dtype in cases:
        alpha, value = _weighted(head_dim, dtype)
        basis, out = _meta(16, head_dim, texts, dtype=FULL), _meta(IMAGES, 257, texts, dtype=FULL)
        for config in text_maps.configs(texts, head_dim, dtype, capability):
            launch = text_maps.plan(alpha, value, basis, out, None, config)
            yield Specimen("text_maps", f"T={texts} E={head_dim} {_name(dtype)}", launch, dtype != FULL)
    values = list(_meta(4, IMAGES, 257, 16, 64))
    alphas, bases = _meta(IMAGES, 4, 16, 257, dtype=FULL), _meta(4, 16, 64, 1000, dtype=FULL)
    for config in text_maps.configs(1000, 64, LOW, capability):
        launch, _ = text_maps.plan_layered(alphas, values, bases, None, config)
        yield Specimen("layered_text_maps", "T=1000 E=64 bf16", launch, True)


def _token_contributions(capability: int) -> Iterator[Specimen]:
    shift, scale = _meta(IMAGES, 768, dtype=FULL), _meta(IMAGES, dtype=FULL)
    for head_dim, dtype in ((64, LOW), (80, LOW), (104, LOW), (64, FULL)):
        alpha, value = _weighted(head_dim, dtype)
        basis = _meta(16, head_dim, 768, dtype=FULL)
        for config in token_contributions.configs(768, dtype, capability):
            launch, _ = token_contributions.plan(alpha, value, basis, shift, scale, config)
            yield Specimen("token_contributions", f"D=768 E={head_dim} {_name(dtype)}", launch, dtype != FULL)
    alpha, value = _weighted(64, LOW)
    for texts in (1, 100):
        basis = _meta(16, 64, texts, dtype=FULL)
        for config in token_contributions.configs(texts, LOW, capability):
            launch, _ = token_contributions.plan_maps(alpha, value, basis, config)
            yield Specimen("head_maps", f"T={texts} E=64 bf16", launch, True)


def _layers(capability: int) -> Iterator[Specimen]:
    activations: tuple[Activation, ...] = ("gelu", "quick_gelu", "gelu_tanh")
    cases = [(IMAGES * 257, 1024, 4096, LOW, activation) for activation in activations]
    cases += [
        (IMAGES, 1024, 4096, LOW, "gelu"),
        (IMAGES * 50, 768, 3072, LOW, "quick_gelu"),
        (IMAGES * 257, 1664, 8192, LOW, "gelu"),
        (IMAGES * 257, 1024, 4096, torch.float16, "gelu"),
        (IMAGES * 257, 1023, 4095, LOW, "gelu"),
        (IMAGES * 257, 1024, 4096, FULL, "gelu"),
    ]
    for rows, width, hidden, dtype, activation in cases:
        x, weight, bias = (_meta(*shape, dtype=dtype) for shape in ((rows, width), (hidden, width), (hidden,)))
        for config in linear.configs(x, weight, capability):
            launch, _ = linear.plan(x, weight, bias, activation, config, capability)
            case = f"{rows}x{width}->{hidden} {activation} {_name(dtype)}"
            yield Specimen("linear_activation", case, launch, dtype != FULL)
    for head_dim, halves, dtype in ((64, True, LOW), (64, False, LOW), (88, False, LOW), (64, True, FULL)):
        qkv, angles = _meta(IMAGES, 196, 3, 12, head_dim, dtype=dtype), _meta(1, 196, head_dim, dtype=FULL)
        for config in rotate.CONFIGS:
            launch = rotate.plan(qkv[:, :, :2], angles, angles, halves, config)
            case = f"E={head_dim} {'halves' if halves else 'neighbours'} {_name(dtype)}"
            yield Specimen("rotate", case, launch, False)
    for width, dtype in ((768, LOW), (1024, LOW), (1280, LOW), (1664, LOW), (1024, FULL)):
        x, delta = _meta(IMAGES * 257, width, dtype=dtype), _meta(IMAGES * 257, width, dtype=dtype)
        weight, bias, carried = _meta(width, dtype=dtype), _meta(width, dtype=dtype), _meta(width, dtype=FULL)
        for config in layer_norm.configs(width):
            for added, summed, variant in (
                (delta, None, "add + norm"),
                (None, None, "norm"),
                (None, carried, "carried + norm"),
            ):
                launch, _ = layer_norm.plan(x, added, weight, bias, 1e-5, summed, config)
                yield Specimen("add_layer_norm", f"W={width} {_name(dtype)}, {variant}", launch, False)


def _fp8(capability: int) -> Iterator[Specimen]:
    if capability < 90:  # no instructions for float8
        return
    for width, activation, dtype in (
        (1024, None, LOW),
        (4096, "gelu", LOW),
        (3072, "quick_gelu", LOW),
        (8192, "gelu", LOW),
    ):
        x = _meta(IMAGES * 257, width, dtype=dtype)
        for config in fp8.configs(width):
            launch, _, _ = fp8.plan(x, activation, config)
            yield Specimen("quantize_rows", f"K={width} {activation or 'alone'} {_name(dtype)}", launch, False)


def _heads(capability: int) -> Iterator[Specimen]:
    groups, columns = 384, 67
    for dtype in (FULL, LOW):
        codes, shared = _meta(IMAGES, groups, 64, dtype=dtype), _meta(IMAGES, 3, dtype=FULL)
        centre = _meta(groups, columns, dtype=FULL)
        total = _meta(groups, columns, dtype=torch.float64)
        second = _meta(groups, columns, columns, dtype=torch.float64)
        for config in moments.CONFIGS:
            launch = moments.plan(codes, shared, centre, total, second, config)
            yield Specimen("moments", f"67 columns {_name(dtype)}", launch, False)
    for rank in (64, 67, 80):
        texts, factor = _meta(64, 3500, rank, dtype=FULL), _meta(64, rank, rank, dtype=FULL)
        for config in span.configs(capability):
            launches, _ = span.plan(texts, factor, 60, 1e-10, config)
            for launch in launches:
                yield Specimen("span", f"T=3500 R={rank} fp32", launch, False)

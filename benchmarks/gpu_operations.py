"""The operation benchmarks of :mod:`benchmarks.gpu_suite`, each against the fastest equivalent in torch.

Every result is checked as it is timed: its first and last rows against float64, by norm, per head where there are any.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_bench import EXACT, OP_LOW, Bench
from benchmarks.gpu_checks import grouped, rows
from clipfast.bench.inputs import unit
from clipfast.bench.measuring import Bar, Call, Check, Comparison
from clipfast.kernels import dispatch, ops, reference
from clipfast.kernels.registration import operations


def units(bench: Bench) -> list[tuple[str, Callable[[Bench], None]]]:
    """Every benchmark by name."""
    benchmarks = (attention, text_maps, mlp, layer_norm, token_contributions, textspan)
    return [(benchmark.__name__, benchmark) for benchmark in benchmarks]


def attention(bench: Bench) -> None:
    """Attention with the class token's row against torch's fastest kernel; then the choice of dispatch."""
    heads, head_dim, batch = bench.sizes.heads, 64, bench.sizes.batch
    few = rows(batch)
    for tokens in bench.sizes.attention:
        qkv = bench.draw(batch, tokens, 3, heads, head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        calls: dict[str, Call] = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            calls[backend.name] = _sdpa(backend, query, key, value)
        best = bench.fastest(calls)
        expected_out, expected_alpha = reference.attention(qkv[few].double())

        def verify(
            call: Call, few: list[int] = few, out: Tensor = expected_out, alpha: Tensor = expected_alpha
        ) -> list[Check]:
            have_out, have_alpha = cast(tuple[Tensor, Tensor], call())
            return [
                Check("out against float64, per head", grouped(have_out[few], out, (2,)), OP_LOW),
                Check("alpha against float64, per head", grouped(have_alpha[few], alpha, (1,)), EXACT),
            ]

        settings = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim}
        own = partial(operations()["attention"], qkv, "cls", "triton")
        bench.compared(
            f"attention N={tokens}",
            ("triton with alpha", own),
            (f"SDPA {best}, without alpha", calls[best]),
            partial(verify, own),
            settings=settings,
            bars=lambda c, n=tokens: (
                (Bar("attention over the best SDPA", c.ratio, {257: 1.25, 577: 1.05}[n], True),)
                if n in (257, 577)
                else ()
            ),
        )
        _dispatch(bench, f"attention N={tokens}", "attention", [qkv, "cls"], verify, settings)


def _dispatch(
    bench: Bench,
    name: str,
    operation: str,
    arguments: list[Any],
    verify: Callable[[Call], Sequence[Check]],
    settings: dict[str, Any],
) -> None:
    """The implementation that ``"auto"`` chooses against the fastest of all candidates."""
    backends, _ = dispatch.candidates(operation, arguments)
    variants = dispatch.variants(operation, arguments, backends)
    candidates = {"/".join(variant).rstrip("/"): run for variant, run in variants.items()}
    calls: dict[str, Call] = {variant: partial(run, *arguments) for variant, run in candidates.items()}
    best = bench.fastest(calls)
    choice = dispatch.choose(operation, arguments)
    automatic = partial(operations()[operation], *arguments, "auto")

    bench.compared(
        f"{name}, dispatch",
        (f"auto ({choice.backend} {choice.variant})".replace(" )", ")"), automatic),
        (f"best of {len(candidates)} ({best})", calls[best]),
        partial(verify, automatic),
        settings=settings,
        bars=lambda comparison: (Bar("dispatch over the best", comparison.ratio, 0.97, True),),
    )


def _complete(operation: str, arguments: list[Any]) -> list[Any]:
    """Arguments of an operation with None for the optional ones that follow."""
    schema = cast(Any, operations()[operation].op)._opoverload._schema
    return arguments + [None] * (len(schema.arguments) - 1 - len(arguments))  # the backend is the last


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return call


def text_maps(bench: Bench) -> None:
    """Text maps in one pass over the values against scaled values and one large product."""
    tokens, heads, head_dim = max(bench.sizes.attention[0], 17), bench.sizes.heads, 64
    batch, texts = bench.sizes.batch, bench.sizes.texts
    value = bench.draw(batch, tokens, 3, heads, head_dim)[:, :, 2]
    alpha = bench.draw(batch, heads, tokens, dtype=torch.float32).softmax(-1)
    basis = bench.draw(heads, head_dim, texts, dtype=torch.float32)
    flat = basis.flatten(0, 1).to(bench.dtype)
    out = torch.zeros(batch, tokens, texts, device=bench.device)
    maps = torch.zeros_like(out)
    few = rows(batch)

    def scaled() -> None:
        weighted = value * alpha.transpose(1, 2)[..., None].to(value.dtype)
        maps.add_(weighted.flatten(2) @ flat)

    arguments = [alpha, value, basis, out, None]
    own = partial(operations()["text_maps"], *arguments, "triton")

    def verify(call: Call) -> list[Check]:
        out.zero_()
        call()
        expected = reference.text_maps(alpha[few].double(), value[few].double(), basis.double())
        return [
            Check("maps against float64, per image", grouped(out[few], expected, (0,)), OP_LOW),
            Check("maps against float64, per text", grouped(out[few], expected, (2,)), OP_LOW),
        ]

    bench.compared(
        f"text maps T={texts}",
        ("triton", own),
        ("scaled values and a product", scaled),
        partial(verify, own),
        settings={"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim, "texts": texts},
        bars=lambda c: (Bar("text maps over scaled values", c.ratio, 2.5, True),),
    )
    _dispatch(bench, f"text maps T={texts}", "text_maps", arguments, verify, {"batch": batch, "texts": texts})


def token_contributions(bench: Bench) -> None:
    """Contributions of every token through every head against a copy of the same size."""
    tokens, heads, head_dim, width = max(bench.sizes.attention[0], 17), bench.sizes.heads, 64, 48 * bench.sizes.heads
    batch = min(bench.sizes.batch, 64)
    value = bench.draw(batch, tokens, 3, heads, head_dim)[:, :, 2]
    alpha = bench.draw(batch, heads, tokens, dtype=torch.float32).softmax(-1)
    basis = bench.draw(heads, head_dim, width, dtype=torch.float32)
    shift, scale = bench.draw(batch, width, dtype=torch.float32), bench.draw(batch, dtype=torch.float32)
    source = torch.ones(batch, tokens, heads, width, device=bench.device)
    target = torch.empty_like(source)
    arguments = [alpha, value, basis, shift, scale]
    own = partial(operations()["token_contributions"], *arguments, "triton")
    few = rows(batch)

    def verify(call: Call) -> list[Check]:
        drawn = [tensor[few].double() for tensor in (alpha, value)]
        expected = reference.token_contributions(*drawn, basis.double(), shift[few].double(), scale[few].double())
        error = grouped(cast(Tensor, call())[few], expected, (2,))
        return [Check("tokens against float64, per head", error, OP_LOW)]

    bench.compared(
        "full tokens",
        ("triton", own),
        ("copy of the same size", lambda: target.copy_(source)),
        partial(verify, own),
        settings={"batch": batch, "tokens": tokens, "heads": heads, "embed_dim": width, "result": "float32"},
        # A copy reads and writes; writing alone takes half its time at the same bandwidth.
        bars=lambda comparison: (Bar("share of copy bandwidth", comparison.ratio / 2, 0.7, True),),
    )
    _dispatch(bench, "full tokens", "token_contributions", arguments, verify, {"batch": batch})


def mlp(bench: Bench) -> None:
    """The first MLP layer fused with its activation against product and activation as two kernels."""
    width = bench.sizes.width
    count, hidden = (bench.sizes.batch * 257, 4 * width) if not bench.dry else (32, 128)
    few = rows(count, 256)
    x = bench.draw(count, width)
    weight, bias = bench.draw(hidden, width, seed=1) * width**-0.5, bench.draw(hidden, seed=2)
    activations: tuple[reference.Activation, ...] = ("gelu", "quick_gelu")
    for activation in activations:
        arguments = [x, weight, bias, activation]
        own = partial(operations()["linear_activation"], *arguments, "triton")

        def verify(call: Call, activation: reference.Activation = activation) -> list[Check]:
            have = cast(Tensor, call())
            expected = reference.linear_activation(x[few].double(), weight.double(), bias.double(), activation)
            return [
                Check("hidden against float64", grouped(have[few], expected), OP_LOW),
                Check("hidden against float64, per column", grouped(have[few], expected, (1,)), 2 * OP_LOW),
            ]

        bench.compared(
            f"MLP in + {activation}",
            ("triton", own),
            ("torch", partial(operations()["linear_activation"], *arguments, "eager")),
            partial(verify, own),
            settings={"rows": count, "width": width, "hidden": hidden, "activation": activation},
        )
        _dispatch(bench, f"MLP in + {activation}", "linear_activation", arguments, verify, {"rows": count})


def layer_norm(bench: Bench) -> None:
    """Residual add and LayerNorm in one pass against two."""
    width = bench.sizes.width
    count = bench.sizes.batch * 257 if not bench.dry else 32
    few = rows(count, 256)
    x, delta = bench.draw(count, width), bench.draw(count, width, seed=1)
    weight, bias = bench.draw(width, seed=2), bench.draw(width, seed=3)
    drawn = x.clone()
    arguments = _complete("add_layer_norm", [x, delta, weight, bias, 1e-5])
    own = partial(operations()["add_layer_norm"], *arguments, "triton")

    def verify(call: Call) -> list[Check]:
        x.copy_(drawn)
        have = cast(Tensor, call())
        parts = [tensor.double() for tensor in (drawn[few], delta[few], weight, bias)]
        stream, expected = reference.add_layer_norm(*parts, 1e-5)
        return [
            Check("norm against float64", grouped(have[few], expected), OP_LOW),
            Check("norm against float64, per column", grouped(have[few], expected, (1,)), 2 * OP_LOW),
            Check("stream against float64", grouped(x[few], stream), OP_LOW),
        ]

    def settled() -> list[Check]:
        checks = verify(own)
        x.copy_(drawn)
        delta.zero_()  # so that the stream does not grow while it is timed
        return checks

    bench.compared(
        "add + LayerNorm",
        ("triton", own),
        ("torch", partial(operations()["add_layer_norm"], *arguments, "eager")),
        settled,
        settings={"rows": count, "width": width},
    )
    _dispatch(bench, "add + LayerNorm", "add_layer_norm", arguments, verify, {"rows": count})


def textspan(bench: Bench) -> None:
    """TEXTSPAN of 64 heads from moments against the same in torch; picks are checked against float64."""
    groups, rank, size = bench.sizes.spans
    texts = unit(bench.draw(groups, bench.sizes.pool, rank, dtype=torch.float64))
    decay = 0.95 ** torch.arange(rank, device=bench.device, dtype=torch.float64)
    factor = torch.linalg.qr(bench.draw(groups, rank, rank, dtype=torch.float64))[0] * decay
    low = texts.float(), factor.float()
    few = rows(groups, 4)

    def verify(backend: str) -> list[Check]:
        picks, variance, _ = ops.span(*low, size, backend=backend)
        expected_picks, expected_variance, _ = reference.span(texts[few].cpu(), factor[few].cpu(), size, 1e-10)
        wrong = (picks[few].cpu() != expected_picks).sum()
        return [
            Check("picks unlike float64's", float(wrong), 0),
            Check("variance against float64, per head", grouped(variance[few].cpu(), expected_variance, (0,)), 1e-4),
        ]

    def run(backend: str) -> tuple[str, Call]:
        return backend, lambda: ops.span(*low, size, backend=backend)

    settings = {"heads": groups, "texts": bench.sizes.pool, "rank": rank, "size": size, "dtype": "float32"}
    bench.compared(
        f"TEXTSPAN of {groups} heads",
        run("triton"),
        ("torch, batched", run("eager")[1]),
        partial(verify, "triton"),
        settings=settings,
    )
    arguments = [*low, size, 1e-10]
    automatic = dispatch.choose("span", arguments).backend
    times = bench.rounds({"auto": run("auto")[1], "torch, batched": run("eager")[1]}, single=True)
    taken = 1e3 * statistics.median(times["auto"])
    bench.record(
        f"TEXTSPAN of {groups} heads, dispatch",
        times,
        settings=settings | {"auto": automatic},
        checks=verify("auto"),
        bars=[Bar(f"TEXTSPAN of {groups} heads, milliseconds", taken, 3, False)],
    )
    cluster = next(backend for backend in dispatch.BACKENDS if backend.name == "cuda")
    reasons = dispatch.unsupported_reasons(cluster, "span", arguments)
    if reasons:
        bench.say(f"  TEXTSPAN by clusters does not run on this device: {', '.join(reasons)}")
        return
    # The model in benchmarks.span_costs predicts at least twice the speed; this measures it.
    name = f"TEXTSPAN of {groups} heads by clusters"
    bench.compared(name, run("cuda"), run("triton"), partial(verify, "cuda"), settings=settings, bars=_faster)


def _faster(comparison: Comparison) -> tuple[Bar, ...]:
    return (Bar("TEXTSPAN by clusters over Triton's", comparison.ratio, 1.5, True),)

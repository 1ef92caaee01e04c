"""The operation benchmarks of :mod:`benchmarks.gpu`, each against the fastest equivalent in torch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_bench import EXACT, OP_LOW, Bench
from clipfast.bench.checks import relative
from clipfast.bench.inputs import unit
from clipfast.bench.measuring import Bar, Call, Check, Comparison, seconds
from clipfast.kernels import dispatch, ops, reference
from clipfast.kernels.registration import operations

Verify = Callable[[], Sequence[Check]]


def attention(bench: Bench) -> None:
    """Attention with the class token's row against torch's fastest kernel; then the choice of dispatch."""
    heads, head_dim = (16, 64) if bench.device == "cuda" else (2, 64)
    for tokens, promised in bench.sizes.attention:
        qkv = bench.draw(bench.sizes.batch, tokens, 3, heads, head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        calls: dict[str, Call] = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            calls[backend.name] = _sdpa(backend, query, key, value)
        best = _best(bench, calls)
        expected_out, expected_alpha = reference.attention(qkv[:2].double())

        def run(backend: str, qkv: Tensor = qkv) -> Call:
            return lambda: ops.attention(qkv, "cls", backend=backend)

        def verify(qkv: Tensor = qkv, out: Tensor = expected_out, alpha: Tensor = expected_alpha) -> list[Check]:
            result = ops.attention(qkv, "cls", backend="triton")
            return [
                Check("out against float64", relative(result[0][:2].double(), out), OP_LOW),
                Check("alpha against float64", relative(cast(Tensor, result[1])[:2].double(), alpha), EXACT),
            ]

        settings = {"batch": bench.sizes.batch, "tokens": tokens, "heads": heads, "head_dim": head_dim}
        bench.compared(
            f"attention N={tokens}",
            ("triton with alpha", run("triton")),
            (f"SDPA {best}, without alpha", calls[best]),
            verify,
            settings=settings,
            bars=lambda c, p=promised: () if p is None else (Bar("attention over the best SDPA", c.ratio, p, True),),
        )
        _dispatch(bench, f"attention N={tokens}", "attention", [qkv, "cls"], verify, settings)


def _dispatch(
    bench: Bench, name: str, operation: str, arguments: list[Any], verify: Verify, settings: dict[str, Any]
) -> None:
    """The implementation that ``"auto"`` chooses against the fastest of all candidates."""
    backends, _ = dispatch.candidates(operation, arguments)
    variants = dispatch.variants(operation, arguments, backends)
    candidates = {"/".join(variant).rstrip("/"): run for variant, run in variants.items()}
    calls: dict[str, Call] = {variant: partial(run, *arguments) for variant, run in candidates.items()}
    best = _best(bench, calls)
    choice = dispatch.choose(operation, arguments)

    def bars(comparison: Comparison) -> tuple[Bar, ...]:
        return (Bar("dispatch over the best", comparison.ratio, 0.97, True),) if bench.device == "cuda" else ()

    bench.compared(
        f"{name}, dispatch",
        (
            f"auto ({choice.backend} {choice.variant})".replace(" )", ")"),
            partial(operations()[operation], *arguments, "auto"),
        ),
        (f"best of {len(candidates)} ({best})", calls[best]),
        verify,
        settings=settings,
        bars=bars,
    )


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return call


def _best(bench: Bench, calls: dict[str, Call]) -> str:
    """The name of the fastest call that runs on this device."""
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            seconds(bench.repeated(call))
            times[name] = min(seconds(bench.repeated(call)) for _ in range(3))
        except RuntimeError as error:
            bench.say(f"  {name} does not run on this device: {str(error).splitlines()[0]}")
    if not times:
        raise RuntimeError("none of the calls runs on this device")
    return min(times, key=lambda name: times[name])


def text_maps(bench: Bench) -> None:
    """Text maps in one pass over the values against scaled values and one large product."""
    tokens, heads, head_dim = (257, 16, 64) if bench.device == "cuda" else (17, 2, 64)
    batch, texts = bench.sizes.batch, bench.sizes.texts
    value = bench.draw(batch, tokens, 3, heads, head_dim)[:, :, 2]
    alpha = bench.draw(batch, heads, tokens, dtype=torch.float32).softmax(-1)
    basis = bench.draw(heads, head_dim, texts, dtype=torch.float32)
    flat = basis.flatten(0, 1).to(bench.dtype)
    out = torch.zeros(batch, tokens, texts, device=bench.device)
    maps = torch.zeros_like(out)

    def scaled() -> None:
        weighted = value * alpha.transpose(1, 2)[..., None].to(value.dtype)
        maps.add_(weighted.flatten(2) @ flat)

    def verify() -> list[Check]:
        result = ops.text_maps(alpha, value, basis, torch.zeros_like(out), backend="triton")
        expected = reference.text_maps(alpha[:2].double(), value[:2].double(), basis.double())
        return [Check("maps against float64", relative(result[:2].double(), expected), OP_LOW)]

    bench.compared(
        f"text maps T={texts}",
        ("triton", lambda: ops.text_maps(alpha, value, basis, out, backend="triton")),
        ("scaled values and a product", scaled),
        verify,
        settings={"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim, "texts": texts},
        bars=lambda c: (Bar("text maps over scaled values", c.ratio, 2.5, True),) if bench.device == "cuda" else (),
    )
    arguments = [alpha, value, basis, out, None]
    _dispatch(bench, f"text maps T={texts}", "text_maps", arguments, verify, {"batch": batch, "texts": texts})


def token_contributions(bench: Bench) -> None:
    """Contributions of every token through every head against a copy of the same size."""
    tokens, heads, head_dim, width = (257, 16, 64, 768) if bench.device == "cuda" else (17, 2, 64, 32)
    batch = min(bench.sizes.batch, 64)
    value = bench.draw(batch, tokens, 3, heads, head_dim)[:, :, 2]
    alpha = bench.draw(batch, heads, tokens, dtype=torch.float32).softmax(-1)
    basis = bench.draw(heads, head_dim, width, dtype=torch.float32)
    shift, scale = bench.draw(batch, width, dtype=torch.float32), bench.draw(batch, dtype=torch.float32)
    source = torch.ones(batch, tokens, heads, width, device=bench.device)
    target = torch.empty_like(source)
    arguments = (alpha, value, basis, shift, scale)

    def verify() -> list[Check]:
        result = ops.token_contributions(*arguments, backend="triton")
        few = [tensor[:2].double() for tensor in (alpha, value)]
        expected = reference.token_contributions(*few, basis.double(), shift[:2].double(), scale[:2].double())
        return [Check("tokens against float64", relative(result[:2].double(), expected), OP_LOW)]

    def bars(comparison: Comparison) -> tuple[Bar, ...]:
        # A copy reads and writes; writing alone takes half its time at the same bandwidth.
        return (Bar("share of copy bandwidth", comparison.ratio / 2, 0.7, True),) if bench.device == "cuda" else ()

    bench.compared(
        "full tokens",
        ("triton", lambda: ops.token_contributions(*arguments, backend="triton")),
        ("copy of the same size", lambda: target.copy_(source)),
        verify,
        settings={"batch": batch, "tokens": tokens, "heads": heads, "embed_dim": width, "result": "float32"},
        bars=bars,
    )


def mlp(bench: Bench) -> None:
    """The first MLP layer fused with its activation against product and activation as two kernels."""
    rows, width, hidden = (bench.sizes.batch * 257, 1024, 4096) if bench.device == "cuda" else (32, 64, 128)
    x = bench.draw(rows, width)
    weight, bias = bench.draw(hidden, width, seed=1) * width**-0.5, bench.draw(hidden, seed=2)
    activations: tuple[reference.Activation, ...] = ("gelu", "quick_gelu")
    for activation in activations:
        arguments = [x, weight, bias, activation]

        def verify(activation: reference.Activation = activation) -> list[Check]:
            result = ops.linear_activation(x, weight, bias, activation, backend="triton")
            expected = reference.linear_activation(x[:512].double(), weight.double(), bias.double(), activation)
            return [Check("hidden against float64", relative(result[:512].double(), expected), OP_LOW)]

        bench.compared(
            f"MLP in + {activation}",
            ("triton", partial(operations()["linear_activation"], *arguments, "triton")),
            ("torch", partial(operations()["linear_activation"], *arguments, "eager")),
            verify,
            settings={"rows": rows, "width": width, "hidden": hidden, "activation": activation},
        )
        _dispatch(bench, f"MLP in + {activation}", "linear_activation", arguments, verify, {"rows": rows})


def layer_norm(bench: Bench) -> None:
    """Residual add and LayerNorm in one pass against two."""
    rows, width = (bench.sizes.batch * 257, 1024) if bench.device == "cuda" else (32, 64)
    x, delta = bench.draw(rows, width), bench.draw(rows, width, seed=1)
    weight, bias = bench.draw(width, seed=2), bench.draw(width, seed=3)
    arguments = [x, delta * 0, weight, bias, 1e-5]  # add zeros, so that the stream does not grow while it is timed

    def verify() -> list[Check]:
        stream = x[:512].clone()
        result = ops.add_layer_norm(stream, delta[:512], weight, bias, 1e-5, backend="triton")
        parts = (x[:512] + delta[:512], None, weight, bias)
        _, expected = reference.add_layer_norm(*(p if p is None else p.double() for p in parts), 1e-5)  # type: ignore[arg-type]
        return [Check("norm against float64", relative(result.double(), expected), OP_LOW)]

    bench.compared(
        "add + LayerNorm",
        ("triton", partial(operations()["add_layer_norm"], *arguments, "triton")),
        ("torch", partial(operations()["add_layer_norm"], *arguments, "eager")),
        verify,
        settings={"rows": rows, "width": width},
    )
    _dispatch(bench, "add + LayerNorm", "add_layer_norm", arguments, verify, {"rows": rows})


def textspan(bench: Bench) -> None:
    """TEXTSPAN of 64 heads from moments against the same in torch; picks are checked against float64."""
    groups, rank, size = (64, 64, 60) if bench.device == "cuda" else (2, 16, 6)
    texts = unit(bench.draw(groups, bench.sizes.pool, rank, dtype=torch.float64))
    decay = 0.95 ** torch.arange(rank, device=bench.device, dtype=torch.float64)
    factor = torch.linalg.qr(bench.draw(groups, rank, rank, dtype=torch.float64))[0] * decay
    low = texts.float(), factor.float()

    def verify(backend: str) -> list[Check]:
        picks, variance, _ = ops.span(*low, size, backend=backend)
        expected_picks, expected_variance, _ = reference.span(texts[:8].cpu(), factor[:8].cpu(), size, 1e-10)
        wrong = (picks[:8].cpu() != expected_picks).sum()
        return [
            Check("picks unlike float64's", float(wrong), 0),
            Check("variance against float64", relative(variance[:8].cpu().double(), expected_variance), 1e-4),
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
        bars=lambda c: (
            (Bar("milliseconds", 1e3 * sorted(c.seconds_a)[len(c.seconds_a) // 2] / bench.sizes.repeats, 6, False),)
            if bench.device == "cuda"
            else ()
        ),
    )
    arguments = [*low, size, 1e-10]
    cluster = next(backend for backend in dispatch.BACKENDS if backend.name == "cuda")
    reasons = dispatch.unsupported_reasons(cluster, "span", arguments)
    if reasons:
        bench.say(f"  TEXTSPAN by clusters does not run on this device: {', '.join(reasons)}")
        return
    # The model in benchmarks.span_costs predicts at least twice the speed; this measures it.
    name = f"TEXTSPAN of {groups} heads by clusters"
    bench.compared(name, run("cuda"), run("triton"), partial(verify, "cuda"), settings=settings, bars=_faster)
    _dispatch(bench, f"TEXTSPAN of {groups} heads", "span", arguments, partial(verify, "auto"), settings)


def _faster(comparison: Comparison) -> tuple[Bar, ...]:
    return (Bar("TEXTSPAN by clusters over Triton's", comparison.ratio, 1.5, True),)

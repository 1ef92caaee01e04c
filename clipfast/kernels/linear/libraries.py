"""Which library multiplies float32 matrices on the CPU.

Torch gives them to the BLAS that it was built with, MKL on x86. ``CLIPFAST_PRODUCTS`` says what is used instead:

* ``torch``: nothing else. The default without OpenBLAS.
* ``tuned``: what is fastest. The default where OpenBLAS is installed (``pip install clipfast[openblas]``).
* ``onednn``: :mod:`clipfast.kernels.linear.onednn`, which comes with torch on x86.
* ``openblas``: :mod:`clipfast.kernels.linear.openblas`.

All are exact to float32's rounding, and their bits differ. With ``tuned`` the first product of a kind is computed by
every library a few times, and the fastest is remembered like the fastest kernel on a GPU
(:mod:`clipfast.kernels.tuning`). Torch's is taken unless another is faster by :data:`LEAST_GAIN`. The number of threads
belongs to the kind: with another number every kind is timed again. ``CLIPFAST_TUNE=0`` takes what is remembered, else
torch's. A named library is never timed, so its bits depend on nothing but the CPU.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from clipfast.kernels import dispatch, native
from clipfast.kernels.dispatch import BackendUnavailable
from clipfast.kernels.linear import onednn, openblas
from clipfast.kernels.reference import Activation

logger = logging.getLogger("clipfast")

VARIABLE = "CLIPFAST_PRODUCTS"
SETTINGS = ("torch", "tuned", "onednn", "openblas")

Product = Callable[[Tensor, Tensor, Tensor | None, Activation | None], Tensor]
"""``f(x Wᵀ + b)`` of ``x``, ``W``, ``b`` and the activation's name."""

LEAST_MULTIPLICATIONS = 2**22
"""Smaller products are torch's: a millisecond has ten of them."""
LEAST_ROWS = 16
"""So are products of fewer rows of ``x``: reading the weight takes most of their time, whoever multiplies."""
LEAST_GAIN = 1.1
"""How many times as fast as torch's product another must be."""
LARGEST_DIFFERENCE = 1e-5
"""Of two libraries' results, relative to the norm. Both round in float32, so more is an error of one of them."""
ROUNDS, LEAST_ROUNDS = 7, 3
"""Timed rounds, each library once in each, and how many of them are run however long they take."""
SECONDS = 1.0
"""What timing a kind may take, beyond the first rounds."""

Kind = tuple[int, int, int, bool, str | None, int]
_chosen: dict[Kind, str] = {}
_lock = threading.Lock()


@cache
def others() -> Mapping[str, Product]:
    """The products besides torch's own that can be used here."""
    usable: dict[str, Product] = {}
    if not onednn.unsupported_reasons():
        usable["onednn"] = onednn.product
    if not openblas.unsupported_reasons():
        usable["openblas"] = openblas.product
        usable["openblas in small parts"] = openblas.product_in_small_parts
    return usable


@cache
def setting() -> str:
    """What ``CLIPFAST_PRODUCTS`` says, read once; else the default.

    Raises:
        BackendUnavailable: it is no setting, or names a library that cannot be used here.
    """
    chosen = os.environ.get(VARIABLE) or ("torch" if openblas.unsupported_reasons() else "tuned")
    if chosen not in SETTINGS:
        raise BackendUnavailable(f"{VARIABLE} is {chosen!r}: choose one of {', '.join(SETTINGS)}")
    reasons = {"onednn": onednn, "openblas": openblas}[chosen].unsupported_reasons() if chosen in SETTINGS[2:] else []
    if reasons:
        raise BackendUnavailable(f"{VARIABLE} is {chosen!r}: {', '.join(reasons)}")
    return chosen


def forget() -> None:
    """Reads the setting again at the next product, and forgets what was chosen in this process; for tests."""
    setting.cache_clear()
    _chosen.clear()
    dispatch.forget()


def considered(x: Tensor, weight: Tensor) -> bool:
    """Whether another library than torch's may compute a product of ``x [..., K]`` and ``weight [M, K]``."""
    return (
        setting() != "torch"
        and x.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST_MULTIPLICATIONS
        and x.numel() >= LEAST_ROWS * weight.shape[1]
        and weight.is_contiguous()
    )


def choose(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, own: Product) -> Product:
    """What computes ``f(x Wᵀ + b)``.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``, or None.
        activation: its name, None for none.
        own: the same by torch's product.
    """
    if not considered(x, weight):
        return own
    name = setting()
    if name == "tuned":
        columns, depth = weight.shape
        rows = 1 << (x.numel() // depth - 1).bit_length()  # so that a smaller last batch is not timed again
        kind = (rows, depth, columns, bias is None, activation, torch.get_num_threads())
        name = _chosen.get(kind) or _tuned(kind, x, weight, bias, own)
    return others().get(name, own)


def _tuned(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, own: Product) -> str:
    """The library remembered for a kind, or the fastest, which is remembered then."""
    from clipfast.kernels import tuning
    from clipfast.kernels.measuring import Measured

    products = {"torch": own, **others()}
    known = tuning.choices(tuning.file_for(x.device))
    call = key(kind)
    with _lock:  # one kind at a time, and each once
        if kind in _chosen:
            return _chosen[kind]
        remembered = known.get(call)
        if remembered is not None and remembered[1] in products:
            _chosen[kind] = remembered[1]
        elif not tuning.enabled():
            return "torch"
        else:
            seconds = time_each(products, x, weight, bias, kind[4])  # type: ignore[arg-type]
            _chosen[kind] = fastest(seconds)
            measured = Measured({("native", name): each for name, each in seconds.items()})
            known.put(call, ("native", _chosen[kind]), measured)
        return _chosen[kind]


def fastest(seconds: Mapping[str, float]) -> str:
    """The library with the least time, torch's unless the gain is at least :data:`LEAST_GAIN`."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds["torch"] >= LEAST_GAIN * seconds[best] else "torch"


def time_each(
    products: Mapping[str, Product], x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> dict[str, float]:
    """Median seconds of each product, in interleaved rounds; without those that fail or disagree with torch's."""
    expected = products["torch"](x, weight, bias, activation)
    working = {"torch": products["torch"]}
    for name, product in products.items():
        if name == "torch":
            continue
        try:
            difference = float((product(x, weight, bias, activation) - expected).norm() / expected.norm())
        except (RuntimeError, ValueError) as error:
            logger.debug("%s cannot compute a product here: %s", name, error)
            continue
        if difference <= LARGEST_DIFFERENCE:
            working[name] = product
        else:
            logger.warning("a product of %s differs from torch's by %.1e: not using it", name, difference)
    seconds: dict[str, list[float]] = {name: [] for name in working}
    begin = time.perf_counter()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for name, product in working.items():
            start = time.perf_counter()
            product(x, weight, bias, activation)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def key(kind: Kind) -> str:
    """A kind as text, with everything else that may change which library is fastest."""
    rows, depth, columns, without_bias, activation, threads = kind
    what = f"{rows}x{depth} {columns}x{depth}{'' if without_bias else ' bias'} {activation or ''}".rstrip()
    loaded = openblas.load().library
    blas = "none" if loaded is None else f"{loaded.version} {loaded.core}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"product({what}; {threads} threads; {_cpu()}, torch {instructions}, C++ {native.isa()}, OpenBLAS {blas})"


@cache
def _cpu() -> str:
    """The CPU's name: the folder of choices may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown CPU")

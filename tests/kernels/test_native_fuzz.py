"""Fuzzing the library in C++: every call either gives the right result or raises ValueError, and the process lives.

Every operation that the backend has needs a line in :data:`OPERATIONS`. The draws are
the same in every run; ``make fuzz`` makes more of them, different in every run. Under ``make sanitize`` a read or write
outside a tensor ends the process.
"""

import os
from math import isnan
from typing import Any

import pytest
import torch
from contracting import floor, poisoned
from fuzz_operations import OPERATIONS, Operation
from fuzzing import WRONGS, Drawn, again, bits, has_memory, memory
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from instructions import THREADS, capped, native_operations, threads, usable
from measures import error
from tolerances import FLOAT64, LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import native, ops
from clipfast.kernels.dispatch import BackendUnavailable
from clipfast.kernels.registration import mutated_arguments

MORE = int(os.environ.get("CLIPFAST_FUZZ", "0"))
"""Examples per operation and property for ``make fuzz``; they differ from run to run."""

QUICK, FULL = 20, 100
"""Examples where there is no time for more: of the quick tests, and of the slow ones that draw the same and go on."""


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))

ISAS = usable()


EVERY_OPERATION = pytest.mark.parametrize("name", OPERATIONS)


def test_every_operation_is_fuzzed() -> None:
    assert OPERATIONS.keys() == native_operations()


# ------------------------------------------------------------------------------------------------------ running


def copied(argument: Any) -> Any:
    if isinstance(argument, list):
        return [again(each) for each in argument]
    return again(argument) if isinstance(argument, Tensor) else argument


def compute(name: str, given: list[Any], isa: str, count: int) -> list[Tensor]:
    """Everything that a call returns and changes, computed from copies; an assertion that it changes nothing else."""
    arguments = [copied(each) for each in given]
    tensors = [at for at, each in enumerate(arguments) if isinstance(each, Tensor) and has_memory(each)]
    changed: list[Tensor] = []
    with capped(isa), threads(count), poisoned("cpu"):
        try:
            returned = getattr(ops, name)(*arguments, backend="native")
            returned = [
                each.clone() for each in (returned if isinstance(returned, tuple) else (returned,)) if each is not None
            ]
            changed = [arguments[at].clone() for at in mutated_arguments(name)]
        finally:
            for at in tensors:
                if changed and at in mutated_arguments(name):
                    arguments[at].copy_(given[at])
                assert torch.equal(bits(memory(arguments[at])), bits(memory(given[at]))), f"argument {at} was changed"
    return [*returned, *changed]


def products_agree(operation: Operation, given: list[Any], count: int) -> bool:
    """Whether torch's part of an operation is the same on one thread."""
    with threads(1):
        one = operation.product(*given)
    with threads(count):
        other = operation.product(*given)
    return one is None or other is None or torch.equal(bits(one), bits(other))


def doubled(arguments: tuple[Any, ...] | list[Any]) -> list[Any]:
    """All numbers in float64; indices stay."""

    def one(each: Any) -> Any:
        if isinstance(each, list):
            return doubled(each)
        return each.double() if isinstance(each, Tensor) and each.is_floating_point() else each

    return [one(each) for each in arguments]


def assert_right(name: str, given: list[Any], have: list[Tensor], kinds: set[str], isa: str) -> None:
    """What is finite by the definition in float64 is near to it, and nothing else is finite."""
    if name == "span":
        assert_spans(given, have, kinds)
        return
    operation = OPERATIONS[name]
    settled = operation.settle(*given)
    expected = operation.define(*doubled(settled))
    tensors = [each for each in given if isinstance(each, Tensor) and each.is_floating_point()]
    low_precision = any(each.dtype.itemsize == 2 for each in tensors) and not operation.exact
    plain = operation.define(*settled) if low_precision else expected
    if "huge" in kinds:  # float32 has other infinities than float64
        return
    sizes = operation.terms(*doubled(settled))[: len(expected)]
    for got, exact, low, terms in zip(have, expected, plain, sizes, strict=True):
        finite = exact.isfinite()
        assert torch.equal(got.isfinite(), finite)
        got, exact, low, terms = got[finite], exact[finite], low[finite], terms[terms.isfinite()]
        if exact.numel():
            denormal = smallest(got.dtype, flushes(operation, got.dtype, isa))
            if low_precision and got.dtype == torch.float32 and flushes(operation, torch.bfloat16, ""):
                denormal += 64 * torch.finfo(torch.bfloat16).smallest_normal  # of a product in between
            limit = FLOAT64 * float(terms.abs().max()) if operation.exact else floor(terms) + denormal
            if low_precision:
                once = torch.finfo(got.dtype).eps / 2 * float(terms.abs().max())  # as good as the definition may be
                away = error(low.to(got.dtype), exact)  # NaN where torch's product reads one beyond the end of a row
                limit += LOW_PRECISION_FACTOR * (once if isnan(away) else max(away, once))
            assert error(got, exact) <= limit


def smallest(dtype: torch.dtype, is_flushed: bool = False) -> float:
    """What rounding to a denormal number may cost: sums of them in float32, and the result's own, all of it if flushed.

    AVX512-BF16's instructions take denormal numbers for zero, whatever the CPU's modes.
    """
    units = [torch.finfo(each).smallest_normal * torch.finfo(each).eps for each in (torch.float32, dtype)]
    return 64 * units[0] + (torch.finfo(dtype).smallest_normal if is_flushed else units[1])


def flushes(operation: Operation, dtype: torch.dtype, isa: str) -> bool:
    """Whether a result in bfloat16 is rounded by such an instruction: of csrc/, or of torch's product on this CPU."""
    by_torch = operation.product is not Operation.product and native.isa() == "avx512_bf16"
    return dtype == torch.bfloat16 and (by_torch or isa == "avx512_bf16")


def assert_spans(given: list[Any], have: list[Tensor], kinds: set[str]) -> None:
    """Picks of the definition, each once, and then an end; none for a head that is not finite."""
    texts, factor, _, floor = given
    for head, (picks, variance, directions) in enumerate(zip(*have, strict=True)):
        picked = int((picks >= 0).sum())
        assert picks[:picked].unique().numel() == picked
        assert picks.tolist()[picked:] == [-1] * (len(picks) - picked)
        assert not variance[picked:].any()
        assert not directions[picked:].any()
        if not (texts[head].isfinite().all() and factor[head].isfinite().all()):
            assert not picked
        elif "huge" not in kinds and not ("denormal" in kinds and torch.float64 in (texts.dtype, factor.dtype)):
            assert_head(texts[head].double(), factor[head].double(), floor, picks, variance.double())
            known = directions[:picked].double()
            assert error(known @ known.T, torch.eye(picked)) <= OP_FLOAT32


def assert_head(left: Tensor, factor: Tensor, floor: float, picks: Tensor, variances: Tensor) -> None:
    """The definition follows the picks: none explains less than another would, and they end where they should.

    Not its own picks: of texts that are equal rounding chooses one here, where products of any size cancel.
    """
    covariance = factor @ factor.T
    noise = FLOAT64 * float(((left.abs() @ covariance.abs()) * left.abs()).sum(1).max()) if left.numel() else 0.0
    first = None
    for pick, variance in zip(picks[: left.shape[1]].tolist(), variances.tolist(), strict=False):
        would = ((left @ covariance) * left).sum(1)
        best = float(would.max())
        first = best if first is None else first
        if pick < 0:
            assert best <= floor * first + noise
            return
        assert best >= floor * first - noise
        assert float(would[pick]) >= best - noise
        assert abs(variance - float(would[pick])) <= OP_FLOAT32 * best + noise + smallest(torch.float32)
        direction = left[pick] / left[pick].norm()
        left = left - torch.outer(left @ direction, direction)
        away = torch.eye(len(direction), dtype=torch.float64) - torch.outer(direction, direction)
        covariance = away @ covariance @ away


# ---------------------------------------------------------------------------------------------------- properties


def check_result(name: str, data: st.DataObject) -> None:
    """Right with every instruction set, and the same on any number of threads."""
    drawn = Drawn(data.draw)
    given = OPERATIONS[name].draw(drawn)
    isa, count = data.draw(st.sampled_from(ISAS)), data.draw(st.sampled_from(THREADS))
    try:
        have = compute(name, given, isa, count)
    except BackendUnavailable as error:
        if "x has strides" not in str(error):
            raise
        reject()
    assert_right(name, given, have, drawn.kinds, isa)
    if products_agree(OPERATIONS[name], given, count):
        for got, one in zip(have, compute(name, given, isa, 1), strict=True):
            assert torch.equal(bits(got), bits(one))


def check_wrong_argument(name: str, data: st.DataObject) -> None:
    """Where the definition has no result either, a ValueError; where it has one, that or a ValueError."""
    drawn = Drawn(data.draw)
    given = OPERATIONS[name].draw(drawn)
    place = data.draw(st.sampled_from([at for at, each in enumerate(given) if isinstance(each, Tensor)]))
    given[place] = WRONGS[data.draw(st.sampled_from(sorted(WRONGS)))](data.draw, given[place])
    isa, count = data.draw(st.sampled_from(ISAS)), data.draw(st.sampled_from(THREADS))
    try:
        have = compute(name, given, isa, count)
    except ValueError:
        return
    assert_right(name, given, have, drawn.kinds, isa)


@EVERY_OPERATION
@fuzzed(QUICK)
@given(data=st.data())
def test_results_are_right(name: str, data: st.DataObject) -> None:
    check_result(name, data)


@pytest.mark.slow
@pytest.mark.skipif(MORE > 0, reason="the quick test draws as many already")
@EVERY_OPERATION
@fuzzed(FULL)
@given(data=st.data())
def test_results_of_more_examples_are_right(name: str, data: st.DataObject) -> None:
    check_result(name, data)


@EVERY_OPERATION
@fuzzed(QUICK)
@given(data=st.data())
def test_wrong_arguments_are_refused_or_computed_right(name: str, data: st.DataObject) -> None:
    check_wrong_argument(name, data)


@pytest.mark.slow
@pytest.mark.skipif(MORE > 0, reason="the quick test draws as many already")
@EVERY_OPERATION
@fuzzed(FULL)
@given(data=st.data())
def test_more_wrong_arguments_are_refused_or_computed_right(name: str, data: st.DataObject) -> None:
    check_wrong_argument(name, data)

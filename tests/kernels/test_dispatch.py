"""Which backend computes a call, and what is said of the others."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import test_cuda
import test_eager  # every backend's suites are imported here: classes are known once defined
import test_native
import test_triton
import torch
from contract import OpsContract
from contracting import DEVICES

from clipfast.kernels import attention, dispatch, examples
from clipfast.kernels.registration import operations

QKV = torch.ones(1, 2, 3, 1, 4)


def test_every_backend_has_a_contract_suite() -> None:
    suites = {test_eager.TestEager, test_triton.TestTriton, test_native.NativeContract}
    assert suites <= {*OpsContract.__subclasses__()}
    whole = {suite.backend for suite in OpsContract.__subclasses__()}
    assert whole | {test_cuda.TestCuda.backend} == {backend.name for backend in dispatch.BACKENDS}


def test_eager_has_every_operation() -> None:
    assert {*dispatch.EAGER.implementations()} == {*operations()}


def test_no_backend_has_an_operation_that_does_not_exist() -> None:
    for backend in dispatch.BACKENDS:
        assert {*backend.implementations()} <= {*operations()}


def test_auto_leaves_the_interpreter_alone() -> None:
    """On the CPU Triton is a test of its kernels, not a way to compute."""
    choice = dispatch.choose("attention", [QKV, "cls"])
    assert choice.backend != "triton"
    assert choice.skipped["triton"] == ["the tensors are not on a GPU"]
    assert not choice.tuned


def test_auto_takes_the_library_on_the_cpu_and_leaves_other_devices_alone() -> None:
    native = next(b for b in dispatch.BACKENDS if b.name == "native")
    for name, implementation in native.implementations().items():
        arguments = examples.arguments(name)
        if not native.unsupported_reasons() and not implementation.auto_skip_reasons(*arguments):
            assert dispatch.choose(name, arguments).backend == "native"
        elsewhere = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
        choice = dispatch.choose(name, elsewhere)
        assert choice.backend == "eager"
        assert choice.skipped["native"] == ["the tensors are not on the CPU"]


def test_a_named_backend_computes() -> None:
    for backend in dispatch.BACKENDS:
        if not backend.unsupported_reasons():
            name = next(iter(backend.implementations()))
            arguments = examples.arguments(name, DEVICES.get(backend.name, "cpu"))
            assert dispatch.choose(name, arguments, backend.name).backend == backend.name


def test_an_operation_that_a_backend_does_not_have_is_left_to_eager() -> None:
    backend = next(b for b in dispatch.BACKENDS if b.name == "triton")
    if backend.unsupported_reasons():
        pytest.skip(", ".join(backend.unsupported_reasons()))
    assert "layer_statistics" not in backend.implementations()
    assert dispatch.choose("layer_statistics", [torch.ones(2, 3), 1e-5], "triton").backend == "eager"


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(dispatch.BackendUnavailable, match=r"unknown backend 'abacus': choose 'auto' or one of .*eager"):
        dispatch.choose("attention", [QKV, "cls"], "abacus")
    with pytest.raises(dispatch.BackendUnavailable, match="unknown backend 'abacus'"):
        dispatch.check("abacus")


# ------------------------------------------------------------------------------------ backends that say no, in a row


@pytest.fixture
def backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dispatch.Backend]]:
    """Makes backends, each with its file for attention; together they are all there are."""
    made: list[dispatch.Backend] = []
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])

    def make(
        name: str,
        *,
        machine: Sequence[str] = (),
        auto_skip: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> dispatch.Backend:
        (tmp_path / f"{name}.py").write_text(
            "from clipfast.kernels.dispatch import Implementation\n"
            f"IMPLEMENTATIONS = {{'attention': Implementation(lambda *a: {name!r}, lambda *a: {[*arguments]})}}\n"
        )
        backend = dispatch.Backend(name, lambda: [*machine], lambda tensor: [*auto_skip])
        made.append(backend)
        monkeypatch.setattr(dispatch, "BACKENDS", tuple(made))
        return backend

    yield make
    dispatch.forget()
    for backend in made:
        sys.modules.pop(f"{attention.__name__}.{backend.name}", None)


def choose(name: str = "auto") -> dispatch.Choice:
    arguments: list[Any] = [QKV, "cls"]
    return dispatch.choose("attention", arguments, name)


def test_auto_takes_the_first_that_can_and_says_why_the_others_cannot(backends: Any) -> None:
    backends("first", machine=["no GPU"])
    backends("second", arguments=["head_dim 88 not built", "float64"])
    backends("third")
    backends("fourth")
    choice = choose()
    assert (choice.backend, choice.run()) == ("third", "third")
    assert choice.skipped == {"first": ["no GPU"], "second": ["head_dim 88 not built", "float64"]}


def test_a_refusal_lists_every_reason(backends: Any) -> None:
    backends("first", machine=["no GPU", "no driver"])
    backends("second", arguments=["head_dim 88 not built"])
    with pytest.raises(
        dispatch.BackendUnavailable,
        match=r"^nothing computes attention: first: no GPU, no driver; second: head_dim 88 not built$",
    ):
        choose()
    with pytest.raises(dispatch.BackendUnavailable, match=r"^first: no GPU, no driver$"):
        choose("first")
    with pytest.raises(dispatch.BackendUnavailable, match=r"^first: no GPU, no driver$"):
        dispatch.check("first")
    with pytest.raises(dispatch.BackendUnavailable, match=r"^second cannot compute attention: head_dim 88 not built$"):
        choose("second")


def test_what_auto_leaves_alone_can_be_named(backends: Any) -> None:
    backends("shy", auto_skip=["only when named"])
    backends("other")
    assert choose().backend == "other"
    assert choose("shy").backend == "shy"


def test_a_triton_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (dispatch._triton_import, dispatch._triton_unsupported):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        with pytest.raises(dispatch.BackendUnavailable, match=r"^triton: triton cannot be imported \(ModuleNotF"):
            dispatch.check("triton")
        assert dispatch.choose("attention", [QKV, "cls"]).backend in ("native", "eager")
    finally:
        for cached in (dispatch._triton_import, dispatch._triton_unsupported):
            cached.cache_clear()


@pytest.mark.parametrize(("triton_is", "numpy_is", "works"), [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True)])
def test_an_interpreter_that_cannot_run_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, triton_is: str, numpy_is: str, works: bool
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_is)
    monkeypatch.setattr(numpy, "__version__", numpy_is)
    reason = f"the interpreter of triton {triton_is} does not work with numpy {numpy_is}"
    assert dispatch._interpreter_faults() == ([] if works else [reason])


def test_the_operations_say_what_they_change() -> None:
    for name, operation in operations().items():
        schema = getattr(torch.ops.clipfast, name).default._schema
        changed = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
        assert changed == operation.mutated
    assert operations()["text_maps"].mutated == (3,)


# ------------------------------------------------------------------------------------------------------ known calls


def like(choice: dispatch.Choice) -> tuple[Any, ...]:
    return choice.backend, choice.variant, choice.skipped


def linear_arguments(rows: int) -> list[Any]:
    """The library divides the weight from 32 rows to 512."""
    return [torch.ones(rows, 1040), torch.ones(1600, 1040), torch.ones(1600)]


def strided(*strides: int) -> torch.Tensor:
    return torch.ones(200).as_strided((2, 3, 8), strides)


def layer_norm_arguments(x: torch.Tensor) -> list[Any]:
    return [x, None, torch.ones(8), torch.ones(8), 1e-5]


PAIRS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "images": ("linear", linear_arguments(511), linear_arguments(513)),
    "dtype": ("attention", [QKV, "cls"], [QKV.double(), "cls"]),
    "device": ("attention", [QKV, "cls"], [QKV.to("meta"), "cls"]),
    "strides": ("add_layer_norm", layer_norm_arguments(strided(24, 8, 1)), layer_norm_arguments(strided(1, 8, 1))),
    "negated": ("attention", [QKV, "cls"], [torch._neg_view(QKV), "cls"]),
    "alignment": (
        "attention",
        [QKV, "cls"],
        [torch.frombuffer(bytearray(97), dtype=torch.float32, offset=1).view(QKV.shape), "cls"],
    ),
    "in a list": (
        "layered_text_maps",
        [torch.ones(1, 1, 1, 2), [torch.ones(1, 2, 1, 4)], torch.ones(1, 1, 4, 3), None],
        [torch.ones(1, 1, 1, 2), [torch.ones(1, 2, 1, 4).double()], torch.ones(1, 1, 4, 3), None],
    ),
}
"""Calls that differ in one respect."""


@pytest.mark.parametrize("pair", PAIRS)
def test_a_known_call_says_nothing_of_another_kind(pair: str) -> None:
    operation, one, other = PAIRS[pair]
    with torch.no_grad():
        assert dispatch.kind(one, False) != dispatch.kind(other, False)
        for arguments in (one, other, one):
            assert like(dispatch.choose_known(operation, arguments)) == like(dispatch.choose(operation, arguments))


def test_a_known_call_without_gradients_says_nothing_of_one_with() -> None:
    arguments = linear_arguments(40)
    for enabled in (False, True, False):
        with torch.set_grad_enabled(enabled):
            assert like(dispatch.choose_known("linear", arguments)) == like(dispatch.choose("linear", arguments))


def test_a_known_call_asks_nobody(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backends("only")
    first = dispatch.choose_known("attention", [QKV, "cls"])
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: pytest.fail("chosen again"))
    assert dispatch.choose_known("attention", [QKV.clone(), "cls"]) is first


def test_backends_that_come_or_go_are_noticed(backends: Any) -> None:
    backends("first")
    assert dispatch.choose_known("attention", [QKV, "cls"], "auto").backend == "first"
    backends("second")
    assert dispatch.choose_known("attention", [QKV, "cls"], "second").backend == "second"


def test_what_torch_must_see_is_not_looked_up() -> None:
    assert dispatch.kind([QKV.clone().requires_grad_()], True) is None
    assert dispatch.kind([QKV.clone().requires_grad_()], False)
    assert dispatch.kind([torch.nn.Parameter(QKV)], False)
    assert dispatch.kind([QKV.as_subclass(type("Own", (torch.Tensor,), {}))], False) is None
    assert dispatch.kind([QKV.to_sparse()], False) == ()


def test_only_so_many_kinds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_KNOWN", 3)
    dispatch.forget()
    for tokens in range(1, 9):
        choice = dispatch.choose_known("attention", [torch.ones(1, tokens, 3, 1, 4), "cls"])
        assert like(choice) == like(dispatch.choose("attention", [torch.ones(1, tokens, 3, 1, 4), "cls"]))
        assert 1 <= dispatch.known_calls(torch.device("cpu")) <= 3


def test_threads_choose_once_per_kind_and_devices_do_not_wait(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads per device at one time: each device's choice is made once, both devices' at once."""
    backends("only")
    dispatch.forget()
    both = threading.Barrier(2, timeout=20)  # passed only if the two devices are inside at once
    asked: list[torch.device] = []
    choose_anew = dispatch.choose

    def slow(operation: str, arguments: Any, name: str) -> dispatch.Choice:
        asked.append(arguments[0].device)
        both.wait()
        return choose_anew(operation, arguments, name)

    monkeypatch.setattr(dispatch, "choose", slow)
    calls = [[QKV.to(device), "cls"] for device in ("cpu", "meta") for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        choices = list(pool.map(lambda arguments: dispatch.choose_known("attention", arguments), calls))
    assert sorted(map(str, asked)) == ["cpu", "meta"]
    assert choices[0] is choices[1]
    assert choices[2] is choices[3]
    assert choices[0] is not choices[2]

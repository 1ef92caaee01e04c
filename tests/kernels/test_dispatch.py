import pytest
import test_eager  # every backend's suite is imported here: classes are known once defined
from contract import OpsContract

from clipfast.kernels import dispatch, ops


def test_every_backend_has_a_contract_suite() -> None:
    assert test_eager.TestEager in OpsContract.__subclasses__()
    assert {suite.backend for suite in OpsContract.__subclasses__()} == {b.name for b in dispatch.BACKENDS}


def test_auto_takes_the_first_that_can_run() -> None:
    able = [backend for backend in dispatch.BACKENDS if not backend.refusals()]
    assert dispatch.choose() is able[0]


def test_every_backend_is_found_by_its_name() -> None:
    for backend in dispatch.BACKENDS:
        if not backend.refusals():
            assert dispatch.choose(backend.name) is backend


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(dispatch.BackendUnavailable, match=r"unknown backend 'abacus': choose 'auto' or one of .*eager"):
        dispatch.choose("abacus")


def test_a_refusal_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*reasons: str) -> dispatch.Backend:
        return dispatch.Backend(reasons[0], ops, lambda: list(reasons[1:]))

    refusing = (no("first", "no GPU", "head_dim 88 not built"), no("second", "not compiled"))
    monkeypatch.setattr(dispatch, "BACKENDS", refusing)
    with pytest.raises(
        dispatch.BackendUnavailable, match=r"^first: no GPU, head_dim 88 not built; second: not compiled$"
    ):
        dispatch.choose()
    with pytest.raises(dispatch.BackendUnavailable, match=r"^second: not compiled$"):
        dispatch.choose("second")

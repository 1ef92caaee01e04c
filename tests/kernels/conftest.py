"""Every call that a test of the kernels makes is chosen twice: as it is known, and anew."""

from collections.abc import Iterator
from typing import Any

import pytest

from clipfast.kernels import dispatch


@pytest.fixture(scope="session", autouse=True)
def known_choices_are_checked() -> Iterator[None]:
    """Known choices stay from test to test, so that a fact which is missing from a call's kind shows."""
    choose_known, choose = dispatch.choose_known, dispatch.choose

    def checked(operation: str, arguments: Any, name: str = dispatch.AUTO, own: Any = None) -> dispatch.Choice:
        known = choose_known(operation, arguments, name, own)
        again = choose(operation, arguments, name)
        assert (known.backend, known.variant, known.skipped) == (again.backend, again.variant, again.skipped)
        return known

    dispatch.choose_known = checked
    yield
    dispatch.choose_known = choose_known

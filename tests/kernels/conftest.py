"""Every call that a test of the kernels makes is chosen twice: as it is known, and anew."""

from collections.abc import Iterator
from typing import Any

import pytest

from clipfast.kernels import dispatch


@pytest.fixture(scope="module", autouse=True)
def known_choices_are_checked() -> Iterator[None]:
    """Known choices stay from test to test, so that a fact which is missing from a call's kind shows."""
    known, choose_known, choose = dispatch.known, dispatch.choose_known, dispatch.choose

    def check(choice: dispatch.Choice, operation: str, arguments: Any, name: str) -> dispatch.Choice:
        again = choose(operation, arguments, name)
        assert (choice.backend, choice.variant, choice.skipped) == (again.backend, again.variant, again.skipped)
        return choice

    def checked_known(operation: str, arguments: Any, name: str) -> dispatch.Choice | None:
        choice = known(operation, arguments, name)
        return None if choice is None else check(choice, operation, arguments, name)

    def checked(operation: str, arguments: Any, name: str = dispatch.AUTO, own: Any = None) -> dispatch.Choice:
        return check(choose_known(operation, arguments, name, own), operation, arguments, name)

    dispatch.known, dispatch.choose_known = checked_known, checked
    yield
    dispatch.known, dispatch.choose_known = known, choose_known

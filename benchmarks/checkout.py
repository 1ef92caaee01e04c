"""Whether a folder is a checkout of the published code (github.com/yossigandelsman/clip_prs)."""

from pathlib import Path

NEEDED = {"prs_hook.py": "hook_prs_logger", "utils/factory.py": "create_model_and_transforms"}
"""File → function that the benchmark calls in it."""


class NotACheckout(ValueError):
    """The path given is not a checkout of the published code."""


def validate(checkout: Path) -> Path:
    """Checks a checkout and returns its absolute path.

    Raises:
        NotACheckout: a file or function is missing; the message names it.
    """
    refusal = f"--reference {checkout} is not a checkout of the published code"
    for name, function in NEEDED.items():
        file = checkout / name
        if not file.is_file():
            raise NotACheckout(f"{refusal}: it has no {name}")
        if f"def {function}" not in file.read_text(encoding="utf-8", errors="replace"):
            raise NotACheckout(f"{refusal}: {name} has no {function}")
    return checkout.resolve()

"""Whether a folder is a checkout of the published code (github.com/yossigandelsman/clip_prs)."""

from pathlib import Path

NEEDED = {"prs_hook.py": "hook_prs_logger", "utils/factory.py": "create_model_and_transforms"}
"""File and the function that is called in it."""


class NotACheckout(ValueError):
    """The path given is not a checkout of the published code."""


def validate(checkout: Path) -> Path:
    """The checkout's absolute path.

    Raises:
        NotACheckout: what is missing, in one line.
    """
    refusal = f"--reference {checkout} is not a checkout of the published code"
    for name, function in NEEDED.items():
        file = checkout / name
        if not file.is_file():
            raise NotACheckout(f"{refusal}: it has no {name}")
        if f"def {function}" not in file.read_text(encoding="utf-8", errors="replace"):
            raise NotACheckout(f"{refusal}: {name} has no {function}")
    return checkout.resolve()

"""``python -m clipfast``: the same as ``clipfast``."""

from clipfast.cli import main

main()

"""``python -m clipfast.cli``."""

from clipfast.cli import main

main()

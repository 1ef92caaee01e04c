"""What the command line does, one file per command; :mod:`clipfast.cli` only parses arguments."""

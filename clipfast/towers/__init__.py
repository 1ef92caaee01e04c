"""Vision towers as plain tensors: one file per package that models come from."""

"""Training of the bundled CLIP on the scenes: `python -m clipfast.scenes.training --help`."""

"""Synthetic scenes with known ground truth: pictures, masks, captions and a bundled CLIP model."""

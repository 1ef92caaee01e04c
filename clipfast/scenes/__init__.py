"""A small world of drawn scenes whose truth is known: pictures, masks, captions and a bundled CLIP."""

"""Text maps in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {
    name: native_ops.IMPLEMENTATIONS[name] for name in ("text_maps", "text_maps_from_tokens", "layered_text_maps")
}

"""Set up before any test module is imported."""

import os
from pathlib import Path

import pytest
import torch

# No test may need a network, wait for one, or find what somebody downloaded before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(__file__).parent / "no-downloads")

# An installed OpenBLAS is used only where a test asks for it: results have the same bits with and without.
os.environ["CLIPFAST_PRODUCTS"] = "torch"

# Where there is a GPU the kernels run on it; elsewhere Triton interprets them, and decides so when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # on tensors this small a second thread only waits for the first

pytest.register_assert_rewrite(
    "builders",
    "contract_attention",
    "contract_heads",
    "contract_layers",
    "contract_linear",
    "contract_maps",
    "contracting",
    "measures",
)


SLOW_WHERE_INTERPRETED = (
    "low_precision",  # the same in float32 with a rounding
    "of_many_tokens",
    "of_other_head_dims",
    "activations_everywhere",
    "quantize_rows_with_an_activation",
    "span_of_float32_texts",
    "the_first_of_equal_texts",
    "added_to_what_is_there",
)
"""Parts of the names of tests of kernels that take long where Triton interprets them; quicker ones are of the same."""


@pytest.hookimpl(tryfirst=True)  # before the marks are asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            of_triton = item.parent is not None and item.parent.name == "TestTriton"
            if of_triton and any(part in item.name for part in SLOW_WHERE_INTERPRETED):
                item.add_marker(pytest.mark.slow)

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


@pytest.hookimpl(tryfirst=True)  # before the marks are asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels in 16 bits are slow tests where Triton interprets them: they repeat the float32 ones with a rounding."""
    if not torch.cuda.is_available():
        for item in items:
            if item.parent is not None and item.parent.name == "TestTriton" and "low_precision" in item.name:
                item.add_marker(pytest.mark.slow)

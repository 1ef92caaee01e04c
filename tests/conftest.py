"""Set up before any test module is imported."""

import os
from pathlib import Path

import pytest
import torch

# No test may need a network, wait for one, or find what somebody downloaded before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(__file__).parent / "no-downloads")

torch.set_num_threads(1)  # on tensors this small a second thread only waits for the first

pytest.register_assert_rewrite("builders", "contract", "measures")

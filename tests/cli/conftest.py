from pathlib import Path

import pytest
from commandline import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP that open_clip's own code loads."""
    return save_model(tmp_path_factory.mktemp("model"))

"""Shared fixtures. One thread: the models here are so small that threads would only wait for each other."""
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")        # read when Triton, and so kernels.py, is imported first


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data folder beside the project, with real data sets; tests that need it skip where it is absent."""
    folder = Path(__file__).parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder (../shared/data) is not here")
    return folder

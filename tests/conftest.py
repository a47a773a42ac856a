"""Shared fixtures."""

import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import absl.logging
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

# TensorBoard's logging library closes the stream that it found when it was imported, if that is not the process's own;
# pytest's captured stream, say, at the next logging.config.dictConfig, which is Hydra's first step.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "official"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def official() -> Path:
    """Golden tensors computed with the official Co-DETR code; not part of the repository."""
    if not OFFICIAL.is_dir():
        pytest.skip("the golden tensors (../shared/official) are not here")
    return OFFICIAL

"""What every test shares. Nothing here imports mech_align: the jaxtyping hook has to see each module first."""

import os
from pathlib import Path

import pytest

# Set before any test module imports a Hugging Face library, and handed on to the command line's own processes.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data sets beside the checkout; without it the test is skipped, saying so."""
    folder = Path(os.environ.get("MECH_ALIGN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing (MECH_ALIGN_DATA names another place)")
    return folder

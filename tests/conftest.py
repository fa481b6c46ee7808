import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of tests that run beside each other, one would import code that another is copying.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hfslim-modules-")

import atexit
import shutil

import pytest
import torch
import transformers

collect_ignore = ["fixtures"]  # Saved models, with the code that travels with them.
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from transformers import masking_utils
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def block_masks_without_compiler(monkeypatch):
    """transformers compiles the mask of flex_attention anew for every shape: seconds each, and the same mask."""
    create = masking_utils.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *args, **kwargs: create(*args, **kwargs | {"_compile": False})
    )

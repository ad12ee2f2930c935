import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import SHAPE
from transformers import masking_utils
from transformers.utils import logging

from hf_decoder.model import loss_hf_decoder

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def block_masks_without_compiler(monkeypatch):
    """transformers compiles the mask of flex_attention anew for every shape: seconds each, and the same mask."""
    create = masking_utils.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *args, **kwargs: create(*args, **kwargs | {"_compile": False})
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows a chunk, in blocks of two, so that tiny inputs take several and the last one is cut short."""
    monkeypatch.setattr(loss_hf_decoder, "CHUNK_ELEMENTS", 5 * SHAPE["vocab_size"])
    monkeypatch.setattr(loss_hf_decoder, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(loss_hf_decoder, "BLOCK_ELEMENTS", 2 * SHAPE["vocab_size"])
    monkeypatch.setattr(loss_hf_decoder, "WEIGHT_ROWS", SHAPE["vocab_size"] // 2 - 1)

"""Fixtures that the tests of the model and of the engine share."""

import pytest
import torch
import torch.nn.attention.flex_attention
from tiny_models import SHAPE
from transformers import masking_utils
from transformers.integrations import flex_attention
from transformers.utils import logging

from hf_decoder.engine import settings
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.model import loss_hf_decoder
from hf_decoder.model.modeling_hf_decoder import HfDecoderLayer

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def flex_attention_without_compiler(monkeypatch):
    """transformers compiles flex_attention and its masks anew for every shape, for minutes, and what is computed is
    the same. Compiled for a growing number of keys, torch 2.13's kernel for AVX2 is no valid C++.
    """
    create, compiled = masking_utils.create_block_mask, flex_attention.compile_friendly_flex_attention
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *args, **kwargs: create(*args, **kwargs | {"_compile": False})
    )
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", _flex_attention)
    return compiled


def _flex_attention(query, key, value, training=False, **settings):
    return torch.nn.attention.flex_attention.flex_attention(query, key, value, **settings)


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows a chunk, in blocks of two, so that tiny inputs take several and the last one is cut short."""
    monkeypatch.setattr(loss_hf_decoder, "CHUNK_ROWS", 5)
    monkeypatch.setattr(engine_loss, "CHUNK_ELEMENTS", 5 * SHAPE["vocab_size"])
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(engine_loss, "BLOCK_ELEMENTS", 2 * SHAPE["vocab_size"])
    monkeypatch.setattr(engine_loss, "WEIGHT_ROWS", SHAPE["vocab_size"] // 2 - 1)


@pytest.fixture
def layers(monkeypatch) -> list[int]:
    """The number of tokens of each call of a layer's module."""
    called = []
    call = HfDecoderLayer.__call__

    def recorded(self, hidden_states, **kwargs):
        called.append(hidden_states.shape[1])
        return call(self, hidden_states, **kwargs)

    monkeypatch.setattr(HfDecoderLayer, "__call__", recorded)
    return called


@pytest.fixture
def in_tiles():
    """Makes sdpa use tiles where the engine is on."""
    with settings.override(ways={"attention": "tiles of 64"}):
        yield

"""Counts against models that exist, and against torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.costs import accounting
from hf_decoder.costs.presets import PRESETS

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LENGTH = 32


CONFIGS = [
    HfDecoderConfig(**SHAPE, tie_word_embeddings=True),
    HfDecoderConfig(**SHAPE, tie_word_embeddings=False, qk_norm=True, attention_bias=True),
    HfDecoderConfig(**SHAPE, head_dim=32),
    LlamaConfig(**SHAPE, tie_word_embeddings=False),
]


def build(config):
    kind = LlamaForCausalLM if isinstance(config, LlamaConfig) else HfDecoderForCausalLM
    return kind._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("config", CONFIGS)
def test_num_parameters_is_that_of_the_model(config):
    model = build(config)
    assert accounting.num_parameters(config) == sum(p.numel() for p in model.parameters()) == model.num_parameters()


def test_num_parameters_of_the_largest_preset_takes_no_memory():
    config = HfDecoderConfig(vocab_size=32768, **PRESETS["8b"])
    assert all(parameter.is_meta for parameter in accounting.meta_model(config).parameters())
    assert 5e9 < accounting.num_parameters(config) < 9e9


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_flops_per_token_are_those_that_torch_counts(config, training):
    # Eager attention: all of it is matrix products, which the counter sees.
    model = build(config).train(training)
    ids = torch.arange(LENGTH)[None] % 128
    with FlopCounterMode(display=False) as counter:
        if training:
            logits = model(input_ids=ids, use_cache=False).logits
            logits.sum().backward()
        else:
            with torch.no_grad():
                model(input_ids=ids)
    counted = counter.get_total_flops() / LENGTH
    # RoPE's outer product of positions and frequencies is a matrix product too: head_dim multiply-adds a token.
    expected = accounting.flops_per_token(config, LENGTH, training=training)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_flops_of_sliding_layers_stop_at_the_window():
    full = HfDecoderConfig(**SHAPE)
    sliding = HfDecoderConfig(**SHAPE, sliding_window=16)
    at_window = accounting.flops_per_token(full, 16)
    assert accounting.flops_per_token(sliding, 16) == at_window
    assert accounting.flops_per_token(sliding, 200) == at_window < accounting.flops_per_token(full, 200)


@pytest.mark.parametrize("config", CONFIGS)
def test_kv_bytes_are_those_of_the_cache(config):
    model = build(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.arange(LENGTH)[None] % 128, past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert accounting.kv_cache_bytes(config, LENGTH, torch.float32) == held
    assert accounting.kv_bytes_per_token(config, torch.float32) * LENGTH == held
    assert accounting.serving_bytes(config, LENGTH, torch.float32) == held + 4 * model.num_parameters()


def test_training_memory_is_states_and_what_backward_keeps():
    config = HfDecoderConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 64})
    model = HfDecoderForCausalLM(config).train()
    rows, length = 2, 128
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(length)[None].repeat(rows, 1) % 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    # Autocast's bf16 copies of the weights are kept too; they are part of the 16 bytes' allowance, not activations.
    activations = sum(kept.values()) - 2 * accounting.matmul_parameters(config)
    estimate = accounting.training_bytes(config, rows, length) - 16 * accounting.num_parameters(config)
    assert estimate == pytest.approx(activations, rel=0.35)


def test_mfu():
    # 1000 tokens/s x 1e9 FLOPs of 4e12 FLOP/s
    assert accounting.mfu(1000, 1e9, 4e12) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="peak"):
        accounting.mfu(1000, 1e9, 0)


def test_hardware_names_device_and_versions():
    facts = accounting.hardware()
    assert facts["torch"] == torch.__version__
    assert facts["device"]

"""transformers' `generate_batch`, written by `generate` in rows on a CPU: the same texts, sooner."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_decoder.engine.decoding import row_batches

PROMPTS = [[5, 6, 7], [9, 8], [11], [4, 3, 2, 1, 9, 8, 7], [12, 13], [1] * 12, [2, 3], [7], [8, 9]]


def config(**given):
    return GenerationConfig(**{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **given})


@pytest.fixture
def own(monkeypatch):
    """The outputs of our own way, None for each call that is transformers'."""
    outputs = []
    of_rows = row_batches.generate_batch

    def noted(*args, **kwargs):
        outputs.append(of_rows(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr("hf_decoder.engine.twins.generate_batch", noted)
    return outputs


def test_texts_are_those_of_the_stock_manager(own):
    model = tiny_model(attn_implementation="sdpa")
    end = model.generate(torch.tensor([PROMPTS[0]]), generation_config=config(eos_token_id=-2))[0, 4].item()
    found = model.generate_batch(PROMPTS, generation_config=config(eos_token_id=end))
    assert own[0] is not None
    small = ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=64)
    expected = model.generate_batch(PROMPTS, config(eos_token_id=end), small, warmup=False)
    assert own[1] is None and list(found) == list(expected)
    for key, output in found.items():
        assert output.prompt_ids == expected[key].prompt_ids
        assert output.generated_tokens == expected[key].generated_tokens
        assert output.is_finished() and output.status == expected[key].status and output.error is None
    assert {len(output.generated_tokens) for output in found.values()} != {6}  # some end before


def test_windows_and_the_limit_of_a_call(own):
    model = tiny_model(attn_implementation="sdpa", sliding_window=4)
    found = model.generate_batch(PROMPTS, config(eos_token_id=-2, max_new_tokens=3), max_new_tokens=9)
    for prompt, output in zip(PROMPTS, found.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config(max_new_tokens=9))
        assert alone[0, len(prompt) :].tolist() == output.generated_tokens


@pytest.mark.parametrize(
    "given",
    [
        {"generation_config": config(repetition_penalty=1.5)},
        {"generation_config": config(num_return_sequences=2, do_sample=True)},
        {"generation_config": config(stop_strings=["a"])},
        {"generation_config": config(), "record_timestamps": True},
        {"generation_config": config(), "persistent_manager": True},
        {"generation_config": config(), "continuous_batching_config": ContinuousBatchingConfig()},
        {"generation_config": config(max_new_tokens=None)},
        {"generation_config": config(), "inputs": [[1, 10**6]]},
        {"generation_config": config(), "inputs": [[]]},
    ],
    ids=str,
)
def test_what_else_may_be_asked_is_for_transformers(given):
    inputs = given.pop("inputs", PROMPTS)
    assert row_batches.generate_batch(tiny_model(), inputs, **given) is None


def test_what_the_model_would_add_is_for_transformers():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    assert row_batches.generate_batch(model, PROMPTS, config()) is not None
    model.generation_config.eos_token_id = 5  # `generate` would end there, and `generate_batch` does not
    assert row_batches.generate_batch(model, PROMPTS, config()) is None
    dynamic = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert row_batches.generate_batch(dynamic, PROMPTS, config()) is None
    model.generation_config.eos_token_id = None
    assert row_batches.generate_batch(model, PROMPTS, config(pad_token_id=10**6)) is not None
    model.generation_config.repetition_penalty = 5.0
    assert row_batches.generate_batch(model, PROMPTS, config()) is None

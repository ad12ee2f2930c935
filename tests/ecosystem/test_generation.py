"""`generate` gives Llama's tokens on the same weights, whatever the search, the cache and the padding."""

import llama_pairs
import pytest
import torch
import transformers
from llama_pairs import stock_model
from packaging.version import Version
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

PAD = 1
PROMPT = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
REPETITIVE = torch.tensor([[17, 23, 42, 77] * 5])


def new_model(seed=0, **overrides):
    shape = {"vocab_size": 300, "num_hidden_layers": 3, "max_position_embeddings": 128}
    return llama_pairs.new_model(seed=seed, **shape | {"pad_token_id": PAD, "eos_token_id": 0} | overrides).eval()


def generate(model, ids=PROMPT, **settings):
    inputs = {"input_ids": ids, "attention_mask": settings.pop("attention_mask", torch.ones_like(ids))}
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 16, "do_sample": False} | settings)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    ours = new_model(tie_word_embeddings=request.param)
    return ours, stock_model(ours)


@pytest.fixture(scope="module")
def ours():
    return new_model()


SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95},
    "sampling three": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.8},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "min_p with penalties": {"do_sample": True, "min_p": 0.02, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "guidance": {"guidance_scale": 1.5},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "early exit": {"eos_token_id": list(range(100, 160))},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_tokens_are_llamas(pair, search):
    ours, stock = pair
    tokens = generate(ours, **SEARCHES[search])
    assert torch.equal(tokens, generate(stock, **SEARCHES[search]))
    assert tokens.shape[1] > PROMPT.shape[1] + 1


@pytest.mark.parametrize("search", ["greedy", "sampling", "beams", "static cache", "no cache"])
def test_scores_are_llamas(pair, search):
    results = [generate(model, return_dict_in_generate=True, output_logits=True, **SEARCHES[search]) for model in pair]
    for step_ours, step_stock in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(step_ours, step_stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_left_padded_batch_equals_single_prompts(implementation, settings):
    ours = new_model()
    ours.set_attn_implementation(implementation)
    stock = stock_model(ours)
    lengths = (9, 4, 1)
    ids = torch.full((3, 9), PAD)
    for row, length in enumerate(lengths):
        ids[row, 9 - length :] = PROMPT[row % 2, :length]
    mask = (ids != PAD).long()
    batch = generate(ours, ids, attention_mask=mask, eos_token_id=None, **settings)
    assert torch.equal(batch, generate(stock, ids, attention_mask=mask, eos_token_id=None, **settings))
    for row, length in enumerate(lengths):
        single = generate(ours, ids[row : row + 1, 9 - length :], eos_token_id=None, **settings)
        assert torch.equal(batch[row, 9 - length :], single[0])


def test_assisted_generation_gives_the_greedy_tokens(ours):
    draft = new_model(seed=1, num_hidden_layers=1)
    same = new_model()
    expected = generate(ours, PROMPT[:1], max_new_tokens=24)
    for assistant in (draft, same):
        assert torch.equal(generate(ours, PROMPT[:1], max_new_tokens=24, assistant_model=assistant), expected)


def test_llama_drafts_for_us_and_we_for_llama(ours):
    stock = stock_model(ours)
    expected = generate(stock, PROMPT[:1])
    assert torch.equal(generate(ours, PROMPT[:1], assistant_model=stock), expected)
    assert torch.equal(generate(stock, PROMPT[:1], assistant_model=ours), expected)


# Until then it cut the cache of a layer that is not called, of any model whose config has layer_types.
CROPS_EMPTY_LAYERS = Version(transformers.__version__) < Version("5.22")


def test_prompt_lookup_gives_the_greedy_tokens(pair):
    ours, stock = pair
    expected = generate(stock, REPETITIVE, max_new_tokens=24)
    assert torch.equal(generate(ours, REPETITIVE, max_new_tokens=24, prompt_lookup_num_tokens=3), expected)


@pytest.mark.xfail(CROPS_EMPTY_LAYERS, reason="transformers fails, with Qwen3 as well", raises=TypeError, strict=True)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_early_exit_gives_the_greedy_tokens(tied):
    ours = new_model(tie_word_embeddings=tied)  # of its own: transformers leaves it with fewer layers where it fails
    expected = generate(stock_model(ours), REPETITIVE, max_new_tokens=24)
    assert torch.equal(generate(ours, REPETITIVE, max_new_tokens=24, assistant_early_exit=1), expected)


def test_streamer_yields_every_token_once(ours, tokenizer):
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.reshape(-1))

        def end(self):
            self.ended = True

    streamer = Collect()
    tokens = generate(ours, PROMPT[:1], streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.pieces), tokens[0])
    assert len(streamer.pieces) == 1 + tokens.shape[1] - PROMPT.shape[1]

    text = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(ours, PROMPT[:1], streamer=text)
    expected = tokenizer.decode(tokens[0, PROMPT.shape[1] :], skip_special_tokens=True)
    assert "".join(text) == expected


def test_generation_continues_from_a_cache(ours):
    whole = generate(ours, PROMPT, max_new_tokens=12, eos_token_id=None)
    first = generate(ours, PROMPT, max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
    second = generate(
        ours, first.sequences, max_new_tokens=7, eos_token_id=None, past_key_values=first.past_key_values
    )
    assert torch.equal(second, whole)


def test_generation_from_embeddings(pair):
    ours, stock = pair
    embeds = ours.get_input_embeddings()(PROMPT)
    mask = torch.ones_like(PROMPT)
    tokens = ours.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, do_sample=False)
    expected = stock.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("cache", [None, "static", "hybrid"], ids=str)
def test_sliding_window_generation_equals_the_forward_pass(cache):
    model = new_model(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    settings = {"max_new_tokens": 14, "eos_token_id": None}
    if cache:
        settings["cache_implementation"] = cache
    tokens = generate(model, **settings)
    expected = PROMPT
    for _ in range(14):
        with torch.no_grad():
            scores = model(expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, expected)


@pytest.mark.peers
def test_quantized_cache(pair):  # quanto compiles for a minute or two at its first use
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 16}  # the tiny rows of this model hold no group of 64
    settings = {"cache_implementation": "quantized", "cache_config": config}
    assert torch.equal(*(generate(model, **settings) for model in pair))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches with CUDA streams")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache(cache):
    model = new_model().to("cuda")
    ids = PROMPT.to("cuda")
    assert torch.equal(generate(model, ids, cache_implementation=cache), generate(model, ids))


@pytest.mark.process
@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching_gives_generates_tokens(implementation, window):
    model = new_model(sliding_window=window)
    model.set_attn_implementation(implementation)
    prompts = [PROMPT[0].tolist(), PROMPT[1, :4].tolist(), REPETITIVE[0].tolist(), [5]]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=1)
    # fewer tokens a step than the prompts hold together, so that requests are split and mixed
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    assert len(outputs) == len(prompts)
    answers = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        expected = generate(model, torch.tensor([prompt]), max_new_tokens=10, eos_token_id=None)
        assert answers[tuple(prompt)] == expected[0, len(prompt) :].tolist()

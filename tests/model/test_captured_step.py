"""The step of Triton kernels gives what the modules give. Without CUDA the kernels are interpreted, on a CPU."""

import copy

import pytest
import torch
from tiny_models import random_ids
from tiny_models import tiny_model as eager_model
from transformers import GenerationMixin, StaticCache, TextStreamer
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.model import captured_step_hf_decoder, decoding_hf_decoder
from hf_decoder.model.captured_step_hf_decoder import CapturedStep, is_capturable
from hf_decoder.model.decoding_hf_decoder import DecodingStep

pytest.importorskip("triton", reason="the kernels are Triton's, which this system has not")
from hf_decoder.model import triton_decoding_hf_decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies matrices of bf16 wrongly
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
VARIANTS = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "nope": {"no_rope_layers": [1, 0]},
    "partial-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "softcap": {"final_logit_softcapping": 2.0},
    "wide-heads": {"head_dim": 128, "qk_norm": True},
}


def tiny_model(dtype: torch.dtype = torch.float32, **overrides):
    return eager_model(attn_implementation="sdpa", **overrides).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    if DEVICE == "cpu":
        monkeypatch.setattr(captured_step_hf_decoder, "MIN_BLOCKS", 1)
        monkeypatch.setattr(triton_decoding_hf_decoder, "SPLITS", 1)
    monkeypatch.setattr(captured_step_hf_decoder, "STEPS_AHEAD", 3)


def padded_ids(length: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(1, length).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[:, :hidden] = 0
    return ids, mask


@torch.no_grad()
def check_steps(model, length: int, hidden: int, steps: int = 2) -> None:
    """The logits and the cache of steps after a prompt whose first tokens are hidden."""
    captured = CapturedStep(DecodingStep(model))
    ids, mask = padded_ids(length, hidden)
    ours = StaticCache(config=model.config, max_cache_len=length + steps)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, past_key_values=ours, use_cache=True, attention_mask=mask, position_ids=positions)
    theirs = copy.deepcopy(ours)
    for step in range(steps):
        token = random_ids(1, 1, seed=step + 1).to(DEVICE)
        mask = torch.cat((mask, mask.new_ones(1, 1)), 1)
        positions = mask.sum(-1, keepdim=True) - 1
        expected = model(
            token, past_key_values=theirs, use_cache=True, attention_mask=mask, position_ids=positions
        ).logits
        assert captured.begin(ours, mask, None)
        found = captured.logits(token)
        tolerance = TOLERANCE[model.dtype]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            expected = getattr(their_layer, name)
            torch.testing.assert_close(
                getattr(our_layer, name), expected, rtol=0, atol=tolerance * expected.abs().max().item()
            )
        assert int(our_layer.cumulative_length) == int(their_layer.cumulative_length) == length + steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_modules(variant, dtype):
    check_steps(tiny_model(dtype, **VARIANTS[variant]), length=9, hidden=0)


@pytest.mark.parametrize(("length", "hidden"), [(1, 0), (5, 3), (31, 31), (70, 20), (70, 69)])
def test_lengths_and_padding_over_several_programs(monkeypatch, length, hidden):
    monkeypatch.setattr(triton_decoding_hf_decoder, "KEYS_PER_SPLIT", 16)
    monkeypatch.setattr(triton_decoding_hf_decoder, "SPLITS", 4)
    monkeypatch.setattr(captured_step_hf_decoder, "BLOCK_KEYS", {torch.float32: 16})
    if hidden == length:
        hidden -= 1
    check_steps(tiny_model(), length, hidden)


# of real models where there is a GPU; the interpreter would take minutes for these
SIZES = [(576, 9, 3, 1536), (2048, 16, 4, 5632)] if DEVICE == "cuda" else [(96, 3, 1, 320)]


@pytest.mark.parametrize("length", [40, 300, 1000] if DEVICE == "cuda" else [40, 300])
@pytest.mark.parametrize(("hidden_size", "heads", "groups", "inner"), SIZES)
def test_half_precision_is_as_near_to_the_truth_as_the_modules(hidden_size, heads, groups, inner, length):
    config = HfDecoderConfig(
        vocab_size=1000,
        hidden_size=hidden_size,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = HfDecoderForCausalLM(config).eval().to(DTYPES[-1])
        ids = torch.randint(1000, (1, length + 1))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(ids, logits_to_keep=1).logits
        logits = []
        for captured in (None, CapturedStep(DecodingStep(model))):
            cache = StaticCache(config=config, max_cache_len=length + 8)
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
            if captured is None:
                logits.append(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits)
            else:
                assert captured.begin(cache, torch.ones_like(ids), None)
                logits.append(captured.logits(ids[:, -1:]))
    theirs, ours = ((found.double() - expected).norm() / expected.norm() for found in logits)
    assert 0 < ours < 1.2 * theirs, (ours.item(), theirs.item())


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(captured_step_hf_decoder, "WHOLE_ROW", 16)
    monkeypatch.setattr(captured_step_hf_decoder, "BLOCK", 16)
    check_steps(tiny_model(qk_norm=True), length=5, hidden=1)


@pytest.mark.parametrize("blocks", [3, 30])
def test_rows_of_a_block(monkeypatch, blocks):
    monkeypatch.setattr(captured_step_hf_decoder, "MIN_BLOCKS", blocks)
    check_steps(tiny_model(attention_bias=True), length=5, hidden=0, steps=1)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu"},
        {"sliding_window": 4},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_what_the_kernels_do_not_compute_is_left_to_the_modules(overrides):
    assert not is_capturable(DecodingStep(tiny_model(**overrides)))
    assert is_capturable(DecodingStep(tiny_model()))


def test_weights_of_other_types_are_left_to_the_modules():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.to(torch.float16)
    assert not is_capturable(DecodingStep(model))


@pytest.fixture
def runs(monkeypatch) -> list[bool]:
    """Has `generate` with a static cache capture its steps, as on CUDA; records of each whether it chose a token."""
    taken: list[bool] = []
    run = CapturedStep._run

    def recorded(self, chooses: bool) -> None:
        taken.append(chooses)
        run(self, chooses)

    monkeypatch.setattr(CapturedStep, "_run", recorded)
    if DEVICE == "cpu":
        monkeypatch.setattr(decoding_hf_decoder, "has_kernels", lambda x: True)
        monkeypatch.setattr(
            GenerationMixin, "_valid_auto_compile_criteria", lambda self, kwargs, config: not config.disable_compile
        )
    return taken


def static(model, ids, mask=None, **settings):
    fixed = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **(fixed | settings))


def dynamic(model, ids, mask=None, **settings):
    return static(model, ids, mask, cache_implementation=None, **settings)


@pytest.mark.parametrize("hidden", [0, 4])
def test_greedy_text_is_chosen_on_the_device(runs, hidden):
    model = tiny_model()
    ids, mask = padded_ids(7, hidden)
    expected = dynamic(model, ids, mask, max_new_tokens=10)
    assert not runs
    assert static(model, ids, mask, max_new_tokens=10).equal(expected)
    assert runs == [True] * 9
    # a second text, with a cache of another size: the same step, new buffers
    runs.clear()
    assert static(model, ids, mask, max_new_tokens=3).equal(expected[:, :10])
    assert static(model, ids, mask, max_new_tokens=1).equal(expected[:, :8])
    assert runs == [True] * 2


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 9])
def test_text_ends_with_its_first_end_token(runs, place):
    model = tiny_model()
    ids, mask = padded_ids(7, 0)
    whole = dynamic(model, ids, mask, max_new_tokens=10)
    end = int(whole[0, 7 + place])
    expected = dynamic(model, ids, mask, max_new_tokens=10, eos_token_id=[end, 60])
    cache = StaticCache(config=model.config, max_cache_len=40)
    settings = {"cache_implementation": None, "past_key_values": cache}
    assert static(model, ids, mask, max_new_tokens=10, eos_token_id=[end, 60], **settings).equal(expected)
    assert int(cache.layers[0].cumulative_length) == expected.shape[1] - 1
    # and goes on from where it ended
    mask = torch.ones_like(expected)
    more = static(model, expected, mask, max_new_tokens=3, **settings)
    assert more.equal(dynamic(model, expected, mask, max_new_tokens=3))


@pytest.mark.parametrize("first", [0, 6])
def test_a_text_goes_on_from_a_cache_by_all_its_ids_or_the_new_ones(runs, monkeypatch, first):
    model = tiny_model()
    text = random_ids(1, 9).to(DEVICE)
    found = []
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(DecodingStep, "captured", lambda self: None)
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(text[:, :6], past_key_values=cache, use_cache=True)
        settings = {"cache_implementation": None, "past_key_values": cache, "max_new_tokens": 4}
        mask = torch.ones_like(text) if first else None
        found.append(model.generate(text[:, first:], attention_mask=mask, do_sample=False, pad_token_id=0, **settings))
    assert found[0].equal(found[1]) and found[0].shape[1] == 13 - first


class NoMoreThan(StoppingCriteria):
    """Ends a text at this many tokens, in a way of its own."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


def test_everything_else_keeps_the_loop_of_transformers(runs):
    model = tiny_model()
    ids, mask = padded_ids(7, 2)
    tokens: list[torch.Tensor] = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            tokens.append(value)

        def end(self):
            pass

    cases = {
        "sampling": {"do_sample": True},
        "streamer": {"streamer": Streamer()},
        "dictionary": {"return_dict_in_generate": True, "output_scores": True},
        "criterion": {"stopping_criteria": StoppingCriteriaList([NoMoreThan(10)])},
        "processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores])},
        "penalty": {"repetition_penalty": 1.7},
    }
    for name, settings in cases.items():
        runs.clear()
        torch.manual_seed(0)
        expected = dynamic(model, ids, mask, max_new_tokens=4, **settings)
        torch.manual_seed(0)
        found = static(model, ids, mask, max_new_tokens=4, **settings)
        if name == "dictionary":
            torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
            found, expected = found.sequences, expected.sequences
        assert found.equal(expected), name
        assert runs == [False] * (found.shape[1] - 8), name
    assert len(tokens) == 2 * 5


def test_several_rows_and_a_user_who_wants_no_compiler_go_through_the_modules(runs, monkeypatch):
    model = tiny_model()
    compiled = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(1) or model.__call__)
    ids = random_ids(2, 7).to(DEVICE)
    assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    assert compiled
    one = ids[:1]
    assert static(model, one, max_new_tokens=3, disable_compile=True).equal(dynamic(model, one, max_new_tokens=3))
    assert not runs


def test_two_texts_in_turn_keep_their_places(runs):
    model = tiny_model()
    step = DecodingStep(model)
    captured = CapturedStep(step)
    first, second = random_ids(1, 5).to(DEVICE), random_ids(1, 8, seed=1).to(DEVICE)
    caches, logits = [], []
    with torch.no_grad():
        for ids in (first, second):
            caches.append(StaticCache(config=model.config, max_cache_len=12))
            model(ids[:, :-2], past_key_values=caches[-1], use_cache=True)
        for column in (-2, -1):
            for ids, cache in zip((first, second), caches, strict=True):
                seen = ids[:, : ids.shape[1] + column + 1]
                assert captured.begin(cache, torch.ones_like(seen), None)
                logits.append(captured.logits(seen[:, -1:]))
        torch.testing.assert_close(logits[2], model(first).logits[:, -1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[3], model(second).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_weights_that_moved_are_captured_anew(runs):
    model = tiny_model()
    ids = random_ids(1, 5).to(DEVICE)
    first = static(model, ids, max_new_tokens=3)
    step = DecodingStep.of(model)
    captured = step.captured()
    assert step.captured() is captured
    for parameter in model.parameters():  # as `model.to(device)` does it: the same parameter, memory of its own
        parameter.data = parameter.data * 1.5
    second = static(model, ids, max_new_tokens=3)
    assert step.captured() is not captured
    assert second.equal(dynamic(model, ids, max_new_tokens=3)) and not second.equal(first)
    model.to(torch.float64)
    assert step.captured() is None


def test_a_step_captured_in_inference_mode_serves_outside_of_it(runs):
    model = tiny_model()
    ids = random_ids(1, 5).to(DEVICE)
    with torch.inference_mode():
        first = static(model, ids, max_new_tokens=3)
    assert static(model, ids, max_new_tokens=3, repetition_penalty=1.0001).equal(first)
    assert static(model, ids, max_new_tokens=3).equal(first)
    assert runs == [True, True, False, False, True, True]


def test_masks_with_holes_are_refused():
    model = tiny_model()
    captured = CapturedStep(DecodingStep(model))
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids = random_ids(1, 5).to(DEVICE)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    for mask in ([1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0] * 6):
        assert not captured.begin(cache, torch.tensor([mask], device=DEVICE), None)

"""A model call without gradients gives the numbers, caches and errors of the plain modules.

Only one token per row bypasses them: a prompt costs less than a look at all of them.
"""

import copy

import pytest
import torch
from generating import VARIANTS, tiny_model, with_hook
from tiny_models import padded, random_ids
from transformers import DynamicCache, StaticCache

from hf_decoder.engine import precision
from hf_decoder.engine.decoding.step import DecodingStep
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.engine.training.loss import causal_lm_loss
from hf_decoder.model.modeling_hf_decoder import HfDecoderMLP

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def check_numbers(model, ids: torch.Tensor, **inputs) -> None:
    """Those of the plain modules, of logits and of what the caches hold."""
    output = model(ids, **copy.deepcopy(inputs))
    with settings.override(all=False):
        expected = with_hook(model)(ids, **copy.deepcopy(inputs))
    eps = torch.finfo(output.logits.dtype).eps
    if torch.is_autocast_enabled("cpu"):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype("cpu")).eps)

    def check(found: torch.Tensor, plain: torch.Tensor) -> None:
        assert found.dtype == plain.dtype and (found - plain).norm() <= 8 * eps * plain.norm()

    check(output.logits, expected.logits)
    cache, theirs = output.get("past_key_values"), expected.get("past_key_values")
    assert output.keys() == expected.keys() and type(cache) is type(theirs)
    for layer, plain in zip(cache.layers if cache else [], theirs.layers if theirs else [], strict=True):
        assert type(layer) is type(plain) and layer.get_seq_length() == plain.get_seq_length()
        check(layer.keys, plain.keys)
        check(layer.values, plain.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_tokens_and_one(variant: str, dtype: torch.dtype):
    model = tiny_model(**VARIANTS[variant]).to(dtype)
    ids, mask = padded(3, 9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for inputs in (
        {},
        {"use_cache": False},
        {"attention_mask": mask},
        {"attention_mask": mask, "position_ids": positions, "use_cache": False, "logits_to_keep": 2},
        {"past_key_values": StaticCache(model.config, max_cache_len=12)},
    ):
        check_numbers(model, ids, **inputs)
    check_numbers(model, random_ids(1, 40))
    cache = model(random_ids(3, 7), use_cache=True).past_key_values
    for tokens in (4, 1):
        check_numbers(model, ids[:, :tokens], past_key_values=cache)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_rows(dtype: torch.dtype, is_fast: bool, monkeypatch):
    """In tiles, and by products of few and of many rows."""
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, dtype, is_fast)
    model = tiny_model(max_position_embeddings=512, qk_norm=True, attention_bias=True).to(dtype)
    for rows, tokens in ((1, 2), (1, 16), (1, 17), (2, 130), (1, 300)):
        check_numbers(model, random_ids(rows, tokens))


@pytest.mark.kernels
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast(variant: str, dtype: torch.dtype, is_fast: bool, monkeypatch):
    """As Trainer evaluates with bf16=True: the casts that the modules make, single tokens included."""
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    model = tiny_model(**VARIANTS[variant]).to(dtype)
    ids, mask = padded(3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ({}, {"use_cache": False}, {"attention_mask": mask, "logits_to_keep": 2}):
            check_numbers(model, ids, **inputs)
        cache = model(random_ids(3, 7), use_cache=True).past_key_values
        for tokens in (4, 1):
            check_numbers(model, ids[:, :tokens], past_key_values=cache)


def test_int8_weights_under_autocast():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with torch.autocast("cpu", torch.bfloat16):
        for rows, tokens in ((1, 1), (3, 1), (3, 9)):
            check_numbers(model, random_ids(rows, tokens))


def test_long_rows_under_autocast():
    model = tiny_model(max_position_embeddings=512, qk_norm=True, attention_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        for rows, tokens in ((1, 1), (1, 17), (2, 130), (1, 300), (8, 300)):
            check_numbers(model, random_ids(rows, tokens))


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_of_ones_own(variant: str, rows: int, kind: str, layers):
    """A user's loop, token by token; the modules round in another order."""
    model = tiny_model(**VARIANTS[variant])
    ids, mask = padded(rows, 20)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for one in (model, with_hook(model)):
        made = []
        cache = StaticCache(model.config, max_cache_len=20) if kind == "static" else None
        for start, stop in ((0, 9), *((i, i + 1) for i in range(9, 20))):
            part = slice(start, stop)
            inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, part], "past_key_values": cache}
            output = one(ids[:, part], **inputs)
            cache = output.past_key_values
            made.append(output.logits)
            if start == 0:
                layers.clear()
        assert cache.get_seq_length() == 20
        logits.append(torch.cat(made, 1)[mask.bool()])
        assert bool(layers) == (one is not model)
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", ["torch", "C++"])
def test_a_layer_runs_its_modules_unless_an_operator_is_faster_in_cpp(way: str, cpp_library, monkeypatch):
    called, call = [], HfDecoderMLP.__call__
    monkeypatch.setattr(HfDecoderMLP, "__call__", lambda *inputs: called.append(1) or call(*inputs))
    with settings.override(ways={"gate": way}):
        tiny_model()(random_ids(2, 13))
    assert len(called) == (2 if way == "torch" else 0)


def test_what_is_left_behind():
    """Nothing is left of a call: keys and values are not views of larger buffers, and weights may change."""
    model, ids = tiny_model(), random_ids(1, 400)
    cache = DynamicCache(config=model.config)
    for token in ids.split(1, -1):
        model(token, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(0.5)
    assert model(ids[:, :9]).logits.equal(with_hook(model)(ids[:, :9]).logits)


def test_a_tuple_and_the_defaults_of_the_config():
    model, ids = tiny_model(use_cache=False), random_ids(1, 5)
    output = model(ids)
    assert output.past_key_values is None and output.keys() == {"logits"}
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5
    (logits,) = model(ids, return_dict=False)
    assert logits.equal(output.logits)
    cache = DynamicCache(config=model.config)
    assert model(ids, past_key_values=cache, use_cache=False).past_key_values is cache and cache.get_seq_length() == 5


@pytest.mark.parametrize("vocab_rows", [1, 4, 1000])
@pytest.mark.parametrize("z_loss_coef", [0.0, 1e-2])
def test_a_loss_of_logits(z_loss_coef: float, vocab_rows: int, monkeypatch):
    """As Trainer evaluates, without gradients and with them."""
    monkeypatch.setattr(engine_loss, "BLOCK_ELEMENTS", 2 * 61 * vocab_rows)
    model, (ids, mask) = tiny_model(final_logit_softcapping=5.0), padded(3, 9)
    labels = ids.masked_fill(mask == 0, -100)
    for inputs in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 50, "attention_mask": mask},
        {"shift_labels": labels},
        {"labels": torch.full_like(ids, -100)},
    ):
        output = model(ids, **inputs)
        with torch.enable_grad():
            expected = model(ids, **inputs)
        assert list(output) == list(expected)
        torch.testing.assert_close(output.logits, expected.logits.detach(), rtol=0, atol=2e-6)
        torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=1e-6, atol=0)
    logits = output.logits
    found = causal_lm_loss(logits, labels, 61, z_loss_coef=z_loss_coef)
    with torch.enable_grad():
        expected = causal_lm_loss(logits.double().requires_grad_(), labels, 61, z_loss_coef=z_loss_coef)
    torch.testing.assert_close(found.double(), expected.detach().double(), rtol=1e-6, atol=0)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert model(ids, labels=labels).loss == 7


class Looker(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def one_more(model, cache, **kwargs):
    return model(random_ids(1, 1), past_key_values=cache, **kwargs)


NEEDS = {
    "gradients": lambda model, cache: torch.enable_grad()(one_more)(model, cache),
    "training": lambda model, cache: one_more(model.train(), cache),
    "labels": lambda model, cache: one_more(model, cache, labels=random_ids(1, 1)),
    "another argument": lambda model, cache: one_more(model, cache, token_type_ids=random_ids(1, 1)),
    "hidden states": lambda model, cache: one_more(model, cache, output_hidden_states=True),
    "attentions": lambda model, cache: one_more(model, cache, output_attentions=True),
    "some places": lambda model, cache: one_more(model, cache, logits_to_keep=torch.tensor([0])),
    "embeddings": lambda model, cache: model(
        inputs_embeds=model.model.embed_tokens(random_ids(1, 1)), past_key_values=cache
    ),
    "torch.jit": lambda model, cache: torch.jit.trace(Looker(model), random_ids(1, 1), check_trace=False),
    "torch.func": lambda model, cache: torch.func.vmap(Looker(model))(random_ids(1, 1)[None]),
    "a compiled layer": lambda model, cache: (model.model.layers[1].compile(backend="eager"), one_more(model, cache)),
    "a hook": lambda model, cache: (model.lm_head.register_forward_hook(lambda *_: None), one_more(model, cache)),
    "another forward": lambda model, cache: (
        setattr(model.lm_head, "forward", model.lm_head.forward),
        one_more(model, cache),
    ),
}


@pytest.mark.parametrize("need", NEEDS)
def test_what_needs_the_modules_has_them(need: str, layers):
    model = tiny_model()
    cache = model(random_ids(1, 5)).past_key_values
    layers.clear()
    one_more(model, cache)
    assert not layers
    NEEDS[need](model, cache)
    assert layers == [1, 1]


def test_documents_in_a_row_do_not_see_each_other():
    model, ids = tiny_model(), random_ids(1, 9)
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    alone = model(ids[:, 4:]).logits
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=2e-5)


@pytest.mark.kernels
def test_a_compiled_model_is_one_graph_of_the_modules(layers):
    model, ids = tiny_model(), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    layers.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0, atol=2e-5)
    assert layers == [12, 12]  # while it was traced


def test_what_is_wrong_is_said_by_the_modules():
    model = tiny_model()
    for inputs, words in (
        ({}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": torch.full((1, 4), 999)}, "the vocabulary ends at 60"),
        ({"input_ids": random_ids(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "exactly one of"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**inputs)


def test_another_model_within_generate():
    """A streamer, processor or assistant may call another model during `generate()`."""
    model, other, ids = tiny_model(), tiny_model(seed=1), random_ids(1, 5)
    expected, seen = other(ids).logits, []
    steps = DecodingStep.of(model), DecodingStep.of(other)

    def ask(input_ids, scores):
        seen.append(other(ids).logits.equal(expected))
        return scores

    fixed = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_processor = model.generate(ids, logits_processor=[ask], **fixed)
    assert seen == [True] * 4 and with_processor.equal(model.generate(ids, **fixed))
    assert steps == (DecodingStep.of(model), DecodingStep.of(other))

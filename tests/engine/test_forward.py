"""A model call without gradients bypasses the modules and gives the same numbers, caches and errors."""

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

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def check_bits(model, layers: list[int], ids: torch.Tensor, **inputs) -> None:
    """The same bits as the modules', of logits and of what the caches hold."""
    layers.clear()
    output = model(ids, **copy.deepcopy(inputs))
    assert not layers
    with settings.override(decoding=False):
        expected = model(ids, **copy.deepcopy(inputs))
    assert layers and output.logits.equal(expected.logits) and output.keys() == expected.keys()
    plain, eps = with_hook(model)(ids, **copy.deepcopy(inputs)).logits, torch.finfo(output.logits.dtype).eps
    eps = max(eps, torch.finfo(torch.get_autocast_dtype("cpu")).eps) if torch.is_autocast_enabled("cpu") else eps
    assert (output.logits - plain).norm() <= 8 * eps * plain.norm()
    cache, theirs = output.get("past_key_values"), expected.get("past_key_values")
    assert type(cache) is type(theirs)
    for layer, of_modules in zip(cache.layers if cache else [], theirs.layers if theirs else [], strict=True):
        assert type(layer) is type(of_modules) and layer.get_seq_length() == of_modules.get_seq_length()
        assert layer.keys.equal(of_modules.keys) and layer.values.equal(of_modules.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_tokens_have_the_bits_of_the_modules(variant: str, dtype: torch.dtype, layers):
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
        check_bits(model, layers, ids, **inputs)
    check_bits(model, layers, random_ids(1, 40))
    cache = model(random_ids(3, 7), use_cache=True).past_key_values
    check_bits(model, layers, ids[:, :4], past_key_values=cache)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_long_rows(dtype: torch.dtype, is_fast: bool, layers, monkeypatch):
    """In tiles and blocks, and by products of few and of many rows."""
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, dtype, is_fast)
    model = tiny_model(max_position_embeddings=512, qk_norm=True, attention_bias=True).to(dtype)
    for rows, tokens in ((1, 2), (1, 16), (1, 17), (2, 130), (1, 300)):
        check_bits(model, layers, random_ids(rows, tokens))


@pytest.mark.kernels
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_under_autocast(variant: str, dtype: torch.dtype, is_fast: bool, layers, monkeypatch):
    """As Trainer evaluates with bf16=True: the same casts as the modules make, single tokens included."""
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    model = tiny_model(**VARIANTS[variant]).to(dtype)
    ids, mask = padded(3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ({}, {"use_cache": False}, {"attention_mask": mask, "logits_to_keep": 2}):
            check_bits(model, layers, ids, **inputs)
        cache = model(random_ids(3, 7), use_cache=True).past_key_values
        for tokens in (4, 1):
            check_bits(model, layers, ids[:, :tokens], past_key_values=cache)


def test_bits_of_int8_weights_under_autocast(layers):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with torch.autocast("cpu", torch.bfloat16):
        for rows, tokens in ((1, 1), (3, 1), (3, 9)):
            check_bits(model, layers, random_ids(rows, tokens))


def test_bits_of_long_rows_under_autocast(layers):
    model = tiny_model(max_position_embeddings=512, qk_norm=True, attention_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        for rows, tokens in ((1, 1), (1, 17), (2, 130), (1, 300), (8, 300)):
            check_bits(model, layers, random_ids(rows, tokens))


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
        assert cache.get_seq_length() == 20
        logits.append(torch.cat(made, 1)[mask.bool()])
        assert bool(layers) == (one is not model)
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


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
def test_a_loss_of_logits(z_loss_coef: float, vocab_rows: int, layers, monkeypatch):
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
        layers.clear()
        output = model(ids, **inputs)
        assert not layers
        with torch.enable_grad():
            expected = model(ids, **inputs)
        assert layers and list(output) == list(expected) and output.logits.equal(expected.logits)
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


NEEDS = {
    "gradients": lambda model, ids: torch.enable_grad()(model)(ids),
    "training": lambda model, ids: model.train()(ids),
    "a loss alone": lambda model, ids: model(ids, labels=ids, skip_logits=True),
    "another argument": lambda model, ids: model(ids, labels=ids, token_type_ids=ids),
    "hidden states": lambda model, ids: model(ids, output_hidden_states=True),
    "attentions": lambda model, ids: model(ids, output_attentions=True),
    "some places": lambda model, ids: model(ids, logits_to_keep=torch.tensor([1, 3])),
    "embeddings": lambda model, ids: model(inputs_embeds=model.model.embed_tokens(ids)),
    "documents": lambda model, ids: model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]])),
    "torch.jit": lambda model, ids: torch.jit.trace(Looker(model), ids, check_trace=False),
    "torch.func": lambda model, ids: torch.func.vmap(Looker(model))(ids[None]),
    "a compiled layer": lambda model, ids: (model.model.layers[1].compile(backend="eager"), model(ids)),
    "a hook": lambda model, ids: (model.lm_head.register_forward_hook(lambda *_: None), model(ids)),
    "another forward": lambda model, ids: (setattr(model.lm_head, "forward", model.lm_head.forward), model(ids)),
}


@pytest.mark.parametrize("need", NEEDS)
def test_what_needs_the_modules_has_them(need: str, layers):
    model, ids = tiny_model(), random_ids(1, 5)
    model(ids)
    assert not layers
    NEEDS[need](model, ids)
    assert layers == [5, 5]


def test_documents_in_a_row_do_not_see_each_other():
    model, ids = tiny_model(), random_ids(1, 9)
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    alone = model(ids[:, 4:]).logits
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=2e-5)


@pytest.mark.kernels
def test_a_compiled_model_is_one_graph_of_the_modules(layers):
    model, ids = tiny_model(), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits
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

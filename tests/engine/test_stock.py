"""Stock models: attached they compute the same, detached they are what they were; refusals name the field."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers
from same_results import FIXED, IDS, MASK, check_same
from tiny_models import OUR_WAYS, SHAPE, randomise
from transformers import AutoModelForCausalLM, StaticCache

from hf_decoder.engine import attach, detach, settings
from hf_decoder.engine.cpp.build import find_compiler
from hf_decoder.engine.twins import is_twin

WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA3["original_max_position_embeddings"] = 8
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
LONGROPE |= {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama, biases, llama3": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, yarn": ("Llama", {"tie_word_embeddings": True, "rope_parameters": YARN, "hidden_act": "gelu"}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama, longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"head_dim": None}),
    "qwen2, windows": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "qwen3, windows": ("Qwen3", WINDOWS),
}
each = pytest.mark.parametrize("variant", VARIANTS)
each_family = pytest.mark.parametrize("variant", ["llama", "mistral, window", "qwen2", "qwen3"])


def stock_model(variant: str = "llama", attention: str = "sdpa", **changes):
    family, fields = VARIANTS[variant]
    values = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **SHAPE, **fields, **changes}
    values = {name: value for name, value in values.items() if (name, value) != ("head_dim", None)}
    config = getattr(transformers, f"{family}Config")(**values)
    config._attn_implementation = attention
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config)).eval()


def pair(variant: str = "llama", **changes):
    stock = stock_model(variant, **changes)
    return attach(copy.deepcopy(stock)), stock


@pytest.fixture
def short_is_long():
    with settings.override(ways=OUR_WAYS):
        yield


@each
def test_the_same_in_every_way(variant, short_is_long):
    check_same(*pair(variant))


@each_family
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "how", [{"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_sampled_and_beams(variant, cache, how):
    found = []
    for model in pair(variant):
        torch.manual_seed(0)
        inputs = {"attention_mask": MASK, "cache_implementation": cache, **FIXED, **how}
        found.append(model.generate(IDS, **inputs))
    assert torch.equal(*found)


@pytest.mark.kernels
@each
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_step_in_cpp(variant, cache):
    if find_compiler() is None:
        pytest.skip("needs a compiler")
    model, stock = pair(variant)
    with settings.override(ways={"growing cache": "C++", "short prompt": "C++"}):
        mine = model.generate(IDS, attention_mask=MASK, cache_implementation=cache, **FIXED)
    assert torch.equal(mine, stock.generate(IDS, attention_mask=MASK, cache_implementation=cache, **FIXED))


@each_family
def test_no_module_runs_in_a_decode_step(variant):
    model = attach(stock_model(variant))
    called = []
    kind = type(model.model.layers[0].mlp)
    forward = kind.__call__
    try:
        kind.__call__ = lambda self, *args: called.append(args) or forward(self, *args)
        model.generate(IDS, attention_mask=MASK, **FIXED)
        assert not called
        detach(model).generate(IDS, attention_mask=MASK, **FIXED)
        assert called
    finally:
        del kind.__call__


@each_family
@pytest.mark.parametrize("items", [None, 3, torch.tensor(5)])
@pytest.mark.parametrize("shift", [False, True])
def test_losses(variant, items, shift, short_is_long, small_chunks):
    labels = IDS.masked_fill(MASK == 0, -100)
    inputs = {"labels": labels, "attention_mask": MASK, "num_items_in_batch": items}
    if shift:
        inputs["shift_labels"] = labels
    model, stock = (model.train() for model in pair(variant))
    mine, theirs = model(IDS, **inputs), stock(IDS, **inputs)
    torch.testing.assert_close(mine.loss, theirs.loss)
    assert mine.logits is None and theirs.logits is not None
    mine.loss.backward(), theirs.loss.backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    whole = model(IDS, skip_logits=False, **inputs)
    torch.testing.assert_close((whole.loss, whole.logits), (theirs.loss, theirs.logits), rtol=1e-4, atol=1e-5)


def test_where_transformers_forms_the_loss():
    model, stock = (model.train() for model in pair())
    nothing = {"labels": torch.full_like(IDS, -100)}
    assert model(IDS, **nothing).loss.isnan() and stock(IDS, **nothing).loss.isnan()
    assert len(model(IDS, labels=IDS, return_dict=False)) == len(stock(IDS, labels=IDS, return_dict=False))
    model.loss_function = lambda logits, **inputs: logits.sum()
    assert model(IDS, labels=IDS).loss == model(IDS, labels=IDS).logits.sum()
    kept = {"labels": IDS[:, -2:], "logits_to_keep": 2}
    torch.testing.assert_close(detach(model)(IDS, **kept).logits, stock(IDS, **kept).logits)


@each
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)])
def test_documents_are_seen_where_transformers_sees_them(variant, use_cache, mask, short_is_long):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    inputs = {"position_ids": positions, "use_cache": use_cache, "attention_mask": mask}
    found = []
    for model in pair(variant):
        model.train()
        found.append(model(IDS, labels=IDS, skip_logits=False, **inputs).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_recorded_outputs_and_other_attention(attention):
    model, stock = pair(attention=attention)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        mine, theirs = model(IDS, **wanted), stock(IDS, **wanted)
    torch.testing.assert_close(mine.hidden_states, theirs.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.attentions, theirs.attentions)
    texts = [model.generate(IDS, attention_mask=MASK, **FIXED) for model in (model, stock)]
    assert torch.equal(*texts)


def test_checkpointed_layers(short_is_long):
    losses = []
    for model in pair("qwen3"):
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_compiled(short_is_long):
    model, stock = (model.train() for model in pair())
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(IDS, labels=IDS)
        torch.testing.assert_close(found.loss, stock(IDS, labels=IDS).loss)


def everything(model) -> dict:
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "state": list(model.state_dict()),
        "config": (type(model.config), model.config.to_dict()),
        "generation": model.generation_config.to_dict(),
    }


@each
def test_detached_it_is_what_it_was(variant):
    model = stock_model(variant)
    model.generate(IDS, **FIXED)  # which gives the module of LongRoPE more attributes
    before, parameters = everything(model), dict(model.named_parameters())
    assert attach(attach(model)) is model and is_twin(type(model))
    assert everything(model) | {"classes": 0} == before | {"classes": 0}
    model.generate(IDS, **FIXED)
    assert everything(detach(model)) == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@each_family
def test_saved_and_copied(variant, tmp_path):
    model, stock = pair(variant)
    model.save_pretrained(tmp_path / "attached")
    stock.save_pretrained(tmp_path / "stock")
    saved = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("attached", "stock")]
    assert saved[0] == saved[1]
    assert json.loads(saved[0]["config.json"])["architectures"] == [type(stock).__name__]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert type(loaded) is type(stock)  # never on its own
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    text = stock.generate(IDS, **FIXED)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(other.generate(IDS, **FIXED), text)


def test_a_cache_of_one_s_own_and_an_adapter():
    peft = pytest.importorskip("peft")
    model, stock = pair()
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    found = [
        of.generate(IDS, past_key_values=cache, **FIXED) for of, cache in zip((model, stock), caches, strict=True)
    ]
    assert torch.equal(*found)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])).eval()
    check_same(adapted, detach(copy.deepcopy(adapted)))


class Own(transformers.LlamaForCausalLM):
    """A user's class."""


REFUSED = {
    "config.sliding_window=4": lambda: stock_model(sliding_window=4),
    "config.attention_chunk_size=4": lambda: stock_model(attention_chunk_size=4),
    "config.layer_types has 'chunked_attention'": lambda: stock_model("qwen2", layer_types=["chunked_attention"] * 2),
    "config.layer_types has 1 entries": lambda: changed("qwen3", layer_types=["full_attention"]),
    "config.sliding_window is None": lambda: changed("qwen3", layer_types=["sliding_attention"] * 2),
    "config.rope_parameters rotates 6 of 12": lambda: stock_model(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "config.quantization_config": lambda: changed("llama", quantization_config={"quant_method": "torchao"}),
    "config.model_type is 'mine'": lambda: changed("llama", model_type="mine"),
    "Own is no model": lambda: Own(stock_model().config),
    "Phi3ForCausalLM is no model": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SHAPE | {"num_hidden_layers": 1, "pad_token_id": 0})
    ),
    "LlamaModel is no model": lambda: stock_model().model,
}


def changed(variant: str, **values):
    model = stock_model(variant)
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_hold_is_refused_by_field(reason):
    model = REFUSED[reason]()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as refused:
        attach(model)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert [type(module) for module in model.modules()] == before


def test_a_patched_class_is_refused(monkeypatch):
    kind = type(stock_model().model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x))
    with pytest.raises(ValueError, match=r"LlamaRMSNorm.forward was replaced"):
        attach(stock_model())

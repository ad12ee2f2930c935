"""transformers' pipelines load the model without warnings, and give the model's own outputs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline
from transformers import logging as transformers_logging

import hf_decoder
from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

TEXTS = ["def main(argv):", "the end"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"vocab_size": 300, "pad_token_id": 1, "eos_token_id": 0, "initializer_range": 0.2}


def tiny_config(**overrides):
    return HfDecoderConfig(**SHAPE | overrides)


@pytest.fixture
def said(caplog, monkeypatch):
    """Records what transformers logs at level WARNING and above."""
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    caplog.set_level("WARNING", logger="transformers")
    return caplog


def words(said) -> set[str]:
    return {record.getMessage() for record in said.records if record.name.startswith("transformers")}


def words_about_stock(tokenizer, said) -> set[str]:
    """What transformers logs about its own model in a pipeline: nothing in 5.24, several lines in 5.17."""
    pipe = pipeline("text-generation", model=LlamaForCausalLM(LlamaConfig(**SHAPE)), tokenizer=tokenizer)
    fixed = {"max_new_tokens": 8, "do_sample": False}
    pipe(TEXTS[0], return_tensors=True, **fixed)
    pipe(TEXTS, return_full_text=False, batch_size=2, **fixed)
    of_stock = words(said)
    said.clear()
    return of_stock


def generated(model, tokenizer, text, **kwargs):
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **kwargs)[0]
    return tokens[inputs.input_ids.shape[1] :]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "PEFT"])
def test_text_generation_equals_generate(tokenizer, said, wrapped):
    of_stock = words_about_stock(tokenizer, said)
    torch.manual_seed(0)
    model = HfDecoderForCausalLM(tiny_config()).eval()
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    singles = [
        pipe(text, max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"] for text in TEXTS
    ]
    for text, tokens in zip(TEXTS, singles, strict=True):
        assert tokens[len(tokenizer(text).input_ids) :] == generated(model, tokenizer, text).tolist()
    strings = pipe(TEXTS, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    for text, ((string,),) in zip(TEXTS, zip(strings, strict=True), strict=True):
        expected = tokenizer.decode(generated(model, tokenizer, text), skip_special_tokens=True)
        assert string["generated_text"] == expected
    assert words(said) <= of_stock


def test_text_generation_from_a_folder_with_chat(tokenizer, said, tmp_path):
    of_stock = words_about_stock(tokenizer, said)
    torch.manual_seed(0)
    model = HfDecoderForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert type(pipe.model) is HfDecoderForCausalLM
    chat = [{"role": "user", "content": "the end"}]
    answer = pipe(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.decode(generated(model, tokenizer, prompt), skip_special_tokens=True)
    assert answer[:1] == chat and answer[1] == {"role": "assistant", "content": expected}
    assert words(said) <= of_stock


def test_text_classification(tokenizer, said):
    torch.manual_seed(0)
    labels = {0: "bad", 1: "good", 2: "fair"}
    model = hf_decoder.HfDecoderForSequenceClassification(tiny_config(num_labels=3, id2label=labels)).eval()
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for batch_size in (1, 2):
        scores = pipe(TEXTS, top_k=None, batch_size=batch_size)
        for text, row in zip(TEXTS, scores, strict=True):
            with torch.no_grad():
                expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
            row = {entry["label"]: entry["score"] for entry in row}
            assert row == {labels[i]: pytest.approx(expected[i].item(), abs=1e-5) for i in range(3)}
    assert not words(said)


def test_token_classification(tokenizer, said):
    torch.manual_seed(0)
    model = hf_decoder.HfDecoderForTokenClassification(tiny_config(num_labels=4)).eval()
    pipe = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].softmax(-1)
    entities = pipe(TEXTS[0])
    assert [entity["entity"] for entity in entities] == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
    assert [entity["score"] for entity in entities] == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)
    assert not words(said)


def test_feature_extraction(tokenizer, said):
    torch.manual_seed(0)
    model = hf_decoder.HfDecoderModel(tiny_config()).eval()
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)(TEXTS[1], return_tensors=True)
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state
    assert torch.equal(features, expected)
    assert not words(said)

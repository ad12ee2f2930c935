"""PEFT takes the model as it takes Llama: default targets, training, saving, merging; compared with Llama itself."""

import copy

import pytest
import torch
from llama_pairs import new_model, stock_model
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_decoder import HfDecoderForCausalLM, HfDecoderForSequenceClassification

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

IDS = torch.randint(2, 96, (3, 11), generator=torch.Generator().manual_seed(0))
LM = {"task_type": "CAUSAL_LM"}
TUNERS = {
    "lora": peft.LoraConfig(**LM),
    "lora without task": peft.LoraConfig(),
    "dora": peft.LoraConfig(use_dora=True, **LM),
    "ia3": peft.IA3Config(**LM),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, **LM),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **LM),
}


def attach(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, copy.deepcopy(config))


def train(model, steps=2):
    """Losses of the steps, and of the batch after them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_default_config_trains_saves_and_reloads(tuner, tied, tmp_path):
    base = new_model(tie_word_embeddings=tied)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    stock = attach(stock_model(base), TUNERS[tuner])
    model = attach(base, TUNERS[tuner])
    assert model.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    before = logits(model)
    torch.manual_seed(2)
    losses = train(model)
    torch.manual_seed(2)
    assert losses == pytest.approx(train(stock), abs=1e-4)
    assert losses[0] > losses[1] > losses[2]
    after = logits(model)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, logits(stock), atol=1e-4, rtol=1e-4)
    for name, value in new_model(tie_word_embeddings=tied).state_dict().items():
        assert torch.equal(frozen[name], value)
    for name, value in model.get_base_model().state_dict().items():
        if (name := name.replace("base_layer.", "")) in frozen:
            assert torch.equal(value, frozen[name]), name

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(new_model(tie_word_embeddings=tied), tmp_path)
    assert torch.equal(logits(again), after)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tuner", ["lora", "dora", "ia3"])
def test_merged_equals_adapted(tuner, tied, tmp_path):
    model = attach(new_model(tie_word_embeddings=tied), TUNERS[tuner])
    train(model)
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is HfDecoderForCausalLM
    assert merged.state_dict().keys() == new_model(tie_word_embeddings=tied).state_dict().keys()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"], "all-linear"])
def test_lora_on_the_embeddings_and_the_head(targets, tied):
    config = peft.LoraConfig(target_modules=targets, **LM)
    base = new_model(tie_word_embeddings=tied)
    stock = attach(stock_model(base), config)
    model = attach(base, config)
    assert sorted(model.targeted_module_names) == sorted(stock.targeted_module_names)
    assert train(model) == pytest.approx(train(stock), abs=1e-4)
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(stock), atol=1e-4, rtol=1e-4)
    merged, stock_merged = logits(model.merge_and_unload()), logits(stock.merge_and_unload())
    torch.testing.assert_close(merged, stock_merged, atol=1e-4, rtol=1e-4)
    if not tied or targets == "all-linear":
        # with tied weights an adapter on one of the two is merged into both, here as in Llama
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def test_adapters_that_share_their_weights_as_the_tied_tables_do():
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True, **LM)
    base = new_model(tie_word_embeddings=True)
    stock = attach(stock_model(base), config)
    model = attach(base, config)
    assert model.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    losses = train(model)
    assert losses[0] > losses[-1] and losses == pytest.approx(train(stock), abs=1e-4)
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=1e-4)


def test_untying_before_an_adapter_on_the_head_makes_the_merge_exact(tmp_path):
    # What PEFT's warning advises: load the tied checkpoint untied, copy the table, then adapt and merge.
    tied = new_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    untied = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
    assert torch.equal(logits(untied), logits(tied))
    model = attach(untied, peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], **LM))
    train(model)
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)


def test_modules_to_save_keeps_the_trained_head(tmp_path):
    config = peft.LoraConfig(modules_to_save=["lm_head"], **LM)
    model = attach(new_model(tie_word_embeddings=False), config)
    losses = train(model)
    assert losses[0] > losses[-1]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(new_model(tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_classification_head_is_trained_and_saved(tmp_path):
    def build():
        return new_model(HfDecoderForSequenceClassification, num_labels=3)

    model = attach(build(), peft.LoraConfig(task_type="SEQ_CLS"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert not torch.equal(again.base_model.model.score.weight, build().score.weight)
    assert torch.equal(logits(again), logits(model))


def test_every_table_that_knows_llama_knows_us():
    from peft.utils import constants

    tables = {name: table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")}
    for name, table in tables.items():
        assert ("hf_decoder" in table) == ("llama" in table), name
    assert sum("hf_decoder" in table for table in tables.values()) > 20


@pytest.mark.parametrize(
    "config", ["AdaLoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig", "LNTuningConfig"]
)
def test_other_tuners_attach_where_they_attach_to_llama(config):
    extra = {"total_step": 10} if config == "AdaLoraConfig" else {}
    extra |= {"oft_block_size": 8, "r": 0} if config == "OFTConfig" else {}
    config = getattr(peft, config)(**LM, **extra)
    base = new_model()
    stock = attach(stock_model(base), config)
    model = attach(base, config)
    assert sorted(model.targeted_module_names) == sorted(stock.targeted_module_names) != []
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-5, rtol=1e-5)


def test_adapter_folder_loads_by_auto_classes(tmp_path):
    new_model().save_pretrained(tmp_path / "base")
    model = attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TUNERS["lora"])
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(auto.get_base_model()) is HfDecoderForCausalLM
    assert torch.equal(logits(auto), logits(model))
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(direct) is HfDecoderForCausalLM
    assert torch.equal(logits(direct), logits(model))


def test_adapter_methods_of_the_model(tmp_path):
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION} here, and {peft.__version__} is installed")
    model = new_model()
    plain = logits(model)
    model.add_adapter(peft.LoraConfig(init_lora_weights=False), adapter_name="one")
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    model.save_pretrained(tmp_path)
    again = new_model()
    again.load_adapter(str(tmp_path), adapter_name="two")
    assert torch.equal(logits(again), adapted)
    again.delete_adapter("two")
    assert torch.equal(logits(again), plain)


@pytest.mark.parametrize("tuner", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
def test_generation_with_an_adapter(tuner, window):
    # Cached generation against the plain forward pass of the tuned model, token by token.
    model = attach(new_model(sliding_window=window), TUNERS[tuner])
    train(model)
    prompt = IDS[:1, :5]
    settings = {
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompt),
    }
    generated = model.generate(input_ids=prompt, **settings)
    expected = prompt
    for _ in range(9):
        with torch.no_grad():
            scores = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1]
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, expected)


def test_gradient_checkpointing_with_an_adapter():
    torch.manual_seed(0)
    plain, checkpointed = (attach(new_model(), TUNERS["lora"]) for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)

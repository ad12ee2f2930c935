"""Every family goes in with the logits of the stock class, and comes out bit for bit."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from stock_models import CASES, LLAMA3, MIXED, assert_identical, build, ids, longrope, stored
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.interop import checkpoint, conversion
from hf_decoder.interop.conversion import convert
from hf_decoder.interop.verification import VerificationError, verify

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs).eval()


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again(case: str, tmp_path):
    stock = build(case)
    stock.save_pretrained(tmp_path / "stock")
    assert convert(str(tmp_path / "stock"), tmp_path / "ours") == "HfDecoderForCausalLM"
    ours = load(tmp_path / "ours")
    assert isinstance(ours, HfDecoderForCausalLM)
    # past the original context first, then within it: windows, dynamic RoPE and longrope change there
    for length in (24, 9):
        theirs = stock(ids(2, length)).logits
        torch.testing.assert_close(ours(ids(2, length)).logits, theirs, **TOLERANCE)
        assert theirs.std() > 0.1  # the comparison would say nothing about vanishing logits

    model_type = stock.config.model_type
    assert convert(str(tmp_path / "ours"), tmp_path / "back", to=model_type) == type(stock).__name__
    assert_identical(stored(tmp_path / "back"), stored(tmp_path / "stock"))
    again = load(tmp_path / "back")
    assert type(again) is type(stock)
    torch.testing.assert_close(again(ids(2, 24)).logits, stock(ids(2, 24)).logits, **TOLERANCE)


SHARED = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1, "rms_norm_eps": 1e-5}
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "pad_token_id": 60,
    "sliding_window": 262144,
}
LONG = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.5, 4.0]}
# What the config.json of public checkpoints says, older names of fields included, at a size for tests.
PUBLIC = {
    "Llama 2": LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 6, "rope_scaling": None},
    "Llama 3.2": LLAMA
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": [2, 3],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
    },
    "TinyLlama": LLAMA
    | {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_scaling": None, "rope_theta": 10000.0},
    "SmolLM2": LLAMA
    | {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Yi": LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0, "rope_theta": 5000000.0},
    "Llama, linear": LLAMA | {"num_attention_heads": 6, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "Mistral": {
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 5,
    },
    "Qwen2.5": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "Phi-3 mini 128k": PHI3
    | {"num_attention_heads": 8, "num_key_value_heads": 8, "rope_scaling": {"type": "longrope", **LONG}},
    "Phi-4": PHI3 | {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_scaling": None, "sliding_window": None},
    "Phi-4 mini": PHI3
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **LONG},
        "tie_word_embeddings": True,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLIC)
def test_configs_as_public_checkpoints_write_them(name: str, tmp_path):
    from stock_models import randomise

    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHARED | PUBLIC[name]))
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    stock = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    stock.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.safetensors"):
        file.rename(folder / file.name)
    convert(str(folder), tmp_path / "ours")
    ours = load(tmp_path / "ours")
    for length in (24, 9):
        torch.testing.assert_close(ours(ids(2, length)).logits, stock(ids(2, length)).logits, **TOLERANCE)
    convert(str(tmp_path / "ours"), tmp_path / "back", to=config.model_type)
    assert_identical(stored(tmp_path / "back"), stored(folder))


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-windows", "smollm3-windows", "phi3-partial"])
def test_bfloat16_gives_the_same_greedy_tokens(case: str, tmp_path):
    build(case, torch.bfloat16).save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    # the stock class too is loaded, because `.to(bfloat16)` rounds its rotary frequencies
    stock, ours = load(tmp_path / "stock", dtype="auto"), load(tmp_path / "ours", dtype="auto")
    assert ours.dtype == torch.bfloat16
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    prompt = ids(2, 9)
    mask = torch.ones_like(prompt)
    assert torch.equal(
        ours.generate(prompt, attention_mask=mask, **settings), stock.generate(prompt, attention_mask=mask, **settings)
    )
    convert(str(tmp_path / "ours"), tmp_path / "back", to=stock.config.model_type, verify=False)
    assert_identical(stored(tmp_path / "back"), stored(tmp_path / "stock"))


@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_shards_in_and_out(case: str, tmp_path):
    stock = build(case)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    convert(str(tmp_path / "stock"), tmp_path / "ours", max_shard_size="30KB")
    files = sorted(tmp_path.glob("ours/*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 34_000 for file in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path / "ours").values())
    convert(str(tmp_path / "ours"), tmp_path / "back", to=stock.config.model_type)
    assert_identical(stored(tmp_path / "back"), stored(tmp_path / "stock"))


def test_a_converted_folder_is_what_save_pretrained_writes(tmp_path):
    build("llama").save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    load(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names | {"README.md"}
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "saved")]
    assert configs[0] == configs[1]
    assert "AutoModelForCausalLM" in configs[0]["auto_map"]
    assert_identical(stored(tmp_path / "ours"), stored(tmp_path / "saved"))


@pytest.mark.peers
def test_a_converted_folder_loads_without_this_package(tmp_path, run_python):
    build("qwen3").save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    output = run_python(
        """
        import sys
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(type(model).__name__, model.config.qk_norm)
        """,
        tmp_path / "ours",
        hide=("hf_decoder",),
    )
    assert "HfDecoderForCausalLM True" in output.splitlines()


def test_tokenizer_template_and_generation_config_come_along(tmp_path, tokenizer):
    stock = build("qwen2")
    stock.resize_token_embeddings(len(tokenizer))
    stock.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[1, 3])
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    for source, destination in (("stock", "ours"), ("ours", "back")):
        convert(str(tmp_path / source), tmp_path / destination)
        loaded = AutoTokenizer.from_pretrained(tmp_path / destination)
        text = "def größe():\n    return 'the end'"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.chat_template == tokenizer.chat_template
        settings = GenerationConfig.from_pretrained(tmp_path / destination)
        assert settings.temperature == 0.7
        assert settings.eos_token_id == [1, 3]


def test_a_tokenizer_without_a_class_of_its_own_still_loads(tmp_path, tokenizer):
    stock = build("qwen2")
    stock.resize_token_embeddings(len(tokenizer))
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    path = tmp_path / "stock" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["tokenizer_class"]
    path.write_text(json.dumps(values))
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    texts = [AutoTokenizer.from_pretrained(tmp_path / folder)("the end")["input_ids"] for folder in ("stock", "ours")]
    assert texts[0] == texts[1]


def test_frequencies_of_older_checkpoints_and_a_copied_tied_head_are_left_out(tmp_path):
    from safetensors.torch import save_file

    build("llama-tied").save_pretrained(tmp_path / "stock")
    before = stored(tmp_path / "stock")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    extra["lm_head.weight"] = before["model.embed_tokens.weight"].clone()
    save_file(before | extra, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    assert_identical(stored(tmp_path / "ours"), before)


# ours -> the class that expresses it
OURS = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 10},
    "Qwen2ForCausalLM": {"attention_bias": "qkv"},
    "MistralForCausalLM": {"sliding_window": 7},
    "SmolLM3ForCausalLM": {"sliding_window": 7, "layer_types": MIXED, "no_rope_layers": [1, 0, 1]},
    "Phi3ForCausalLM": longrope(2, partial_rotary_factor=0.5),
}


def ours(**fields) -> HfDecoderForCausalLM:
    from stock_models import SHAPE, randomise

    return randomise(HfDecoderForCausalLM(HfDecoderConfig(**{**SHAPE, **fields})))


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_auto_finds_the_class_that_expresses_a_config(name: str, tmp_path):
    model = ours(**OURS[name])
    model.save_pretrained(tmp_path / "ours")
    assert convert(str(tmp_path / "ours"), tmp_path / "stock") == name
    stock = load(tmp_path / "stock")
    assert type(stock).__name__ == name
    again = load(tmp_path / "ours")  # with the same attention: two of them round differently on some CPUs
    torch.testing.assert_close(stock(ids(2, 24)).logits, again(ids(2, 24)).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("to", "fields", "field"),
    [
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("llama", {"sliding_window": 7}, "sliding_window=7"),
        ("llama", {"attention_bias": "qkv"}, "attention_bias='qkv'"),
        ("llama", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers=[1, 0, 1]"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("qwen3", {}, "qk_norm=False"),
        ("qwen3", {"qk_norm": True, "mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"attention_bias": "qkv", "head_dim": 10}, "head_dim=10"),
        ("mistral", {"sliding_window": 7, "layer_types": MIXED}, "layer_types"),
        ("smollm3", longrope(2, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("phi3", LLAMA3, "rope_type='llama3'"),
        ("auto", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("auto", {"qk_norm": True, "no_rope_layers": [1, 0, 1]}, "no_rope_layers=[1, 0, 1]"),
    ],
)
def test_what_no_class_expresses_is_refused_with_the_field(to: str, fields: dict, field: str, tmp_path):
    ours(**fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError) as error:
        convert(str(tmp_path / "ours"), tmp_path / "stock", to=to)
    assert field in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_verification_notices_a_changed_weight_and_a_changed_config(tmp_path):
    from safetensors.torch import save_file

    build("mistral-window").save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    verify(tmp_path / "stock", tmp_path / "ours")

    path = tmp_path / "ours" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"sliding_window": 6', '"sliding_window": 7'))
    with pytest.raises(VerificationError, match="random ids"):
        verify(tmp_path / "stock", tmp_path / "ours")
    path.write_text(text)

    tensors = stored(tmp_path / "ours")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="random ids"):
        verify(tmp_path / "stock", tmp_path / "ours")


def test_from_one_stock_class_to_another(tmp_path):
    stock = build("mistral")
    stock.save_pretrained(tmp_path / "mistral")
    assert convert(str(tmp_path / "mistral"), tmp_path / "llama", to="llama") == "LlamaForCausalLM"
    assert_identical(stored(tmp_path / "llama"), stored(tmp_path / "mistral"))


@pytest.mark.parametrize(("case", "limit"), [("llama", 1), ("phi3", 1), ("phi3-out", 3)])
def test_only_what_is_being_written_is_in_memory(case: str, limit: int, tmp_path, monkeypatch):
    build(case.removesuffix("-out")).save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    source, to = "stock", "auto"
    if case == "phi3-out":  # three matrices are stacked into one
        convert(str(tmp_path / "stock"), tmp_path / "ours")
        source, to = "ours", "phi3"
    alive: set[int] = set()
    most = []
    read = checkpoint.read_tensors

    def counted(lazy):
        def load():
            tensor = lazy.load()
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most.append(len(alive))
            return tensor

        return replace(lazy, load=load)

    monkeypatch.setattr(
        checkpoint, "read_tensors", lambda folder: {name: counted(lazy) for name, lazy in read(folder).items()}
    )
    convert(str(tmp_path / source), tmp_path / "result", to=to, verify=False)
    assert len(most) >= len(stored(tmp_path / "stock"))
    assert max(most) == limit


def test_what_comes_in_is_compared_with_its_source(tmp_path, monkeypatch):
    build("qwen3").save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    assert "not measured" not in (tmp_path / "ours/README.md").read_text(encoding="utf-8")
    read = conversion.open_source

    def wrong(*of):
        source = read(*of)
        source.config.rope_parameters["rope_theta"] *= 2
        return source

    monkeypatch.setattr(conversion, "open_source", wrong)
    with pytest.raises(VerificationError, match="random ids"):
        convert(str(tmp_path / "stock"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()

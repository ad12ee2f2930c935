"""Whatever is wrong with a checkpoint is one line that names it, and leaves nothing behind."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from stock_models import build, stored
from transformers import GemmaConfig, MixtralConfig

from hf_decoder.interop import checkpoint, conversion, verification
from hf_decoder.interop.checkpoint import parse_size
from hf_decoder.interop.conversion import convert

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def folder(tmp_path):
    """A Llama checkpoint in shards."""
    build("llama").save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    return tmp_path / "stock"


def refused(folder, match: str, **kwargs) -> None:
    """Converting must fail in one line that holds `match`, and leave only what was there."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError) as error:
        convert(str(folder), folder.parent / "result", **kwargs)
    assert match in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(folder.parent.iterdir()) == before


def rewrite(path, **changes) -> None:
    """Changes keys of a JSON file; `None` takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def merged(folder, tensors) -> None:
    """Puts `tensors` into a single file in place of the shards."""
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MixtralConfig(), "num_local_experts=8, that is a mixture of experts"),
        (GemmaConfig(hidden_activation="gelu_pytorch_tanh"), "hidden_activation='gelu_pytorch_tanh', that is a GeGLU"),
    ],
)
def test_a_family_that_is_not_held_is_refused_with_its_field(folder, config, match: str):
    config.save_pretrained(folder)
    refused(folder, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt_bigcode"}, "model_type='gpt_bigcode', which is not supported"),
        ({"model_type": None}, "names no model_type"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        ({"num_local_experts": 4}, "a mixture of experts"),
        ({"hidden_act": "no_such"}, "hidden_act='no_such'"),
        ({"num_hidden_layers": "three"}, "is not a valid LlamaConfig"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_"),
        ({"num_hidden_layers": 4}, "lacks 'model.layers.3."),
        ({"num_hidden_layers": 2}, "holds 'model.layers.2."),
        ({"intermediate_size": 41}, "asks for [41, 48]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
        ({"attention_bias": True}, "bias', which its config.json asks for (12 tensors are absent)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes: dict, match: str):
    rewrite(folder / "config.json", **changes)
    refused(folder, match)


def test_damaged_and_absent_files(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:50])
    refused(folder, "config.json is damaged")
    (folder / "config.json").unlink()
    refused(folder, "it has no config.json")
    (folder / "config.json").write_text(config)

    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(folder, "is damaged or cut short")
    shard.unlink()
    refused(folder, f"shard {shard.name} that")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refused(folder, "holds neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_damaged_files_besides_the_weights_are_named(name: str, folder):
    (folder / name).write_text('{"version": "1.0", "model": {"vo')
    refused(folder, f"{name} is damaged")


def test_settings_of_generation_that_none_can_use_are_named(folder):
    (folder / "generation_config.json").write_text('{"max_new_tokens": 0}')
    refused(folder, "generation_config.json cannot be used: `max_new_tokens` must be greater than 0")


def test_a_source_that_computes_no_numbers_is_named(folder):
    convert(str(folder), folder.parent / "ours")
    tensors = stored(folder.parent / "ours")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder.parent / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(verification.VerificationError, match="logits of the source on random ids are not finite"):
        convert(str(folder.parent / "ours"), folder.parent / "result")


def test_an_index_cannot_point_outside_its_folder(folder):
    index = folder / "model.safetensors.index.json"
    before = json.loads(index.read_text())
    outside = folder.parent / "outside.safetensors"
    first = before["weight_map"]["model.norm.weight"]
    shutil.copyfile(folder / first, outside)
    for path in ("../outside.safetensors", str(outside), "sub/x.safetensors", "..", "", "a\\b", 3):
        weight_map = {n: path if file == first else file for n, file in before["weight_map"].items()}
        index.write_text(json.dumps(before | {"weight_map": weight_map}))
        # names of mixed types do not sort, which is damage too
        refused(folder, "is damaged" if path == 3 else "is not a file of its own folder")


def test_index_and_shards_must_agree(folder):
    index = folder / "model.safetensors.index.json"
    before = json.loads(index.read_text())
    weight_map = before["weight_map"]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if n != "model.norm.weight"}}))
    refused(folder, "holds 'model.norm.weight', which")
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra.weight": weight_map["model.norm.weight"]}}))
    refused(folder, "lacks 'model.extra.weight'")
    index.write_text("[]")
    refused(folder, "is damaged")


def test_missing_surplus_and_misshapen_tensors(folder):
    tensors = stored(folder)
    merged(folder, {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    refused(folder, "lacks 'model.norm.weight'")
    merged(folder, tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    refused(folder, "holds 'model.layers.0.self_attn.q_norm.weight', which its config.json has no place for")
    merged(folder, tensors | {"model.norm.weight": torch.ones(47)})
    refused(folder, "'model.norm.weight' in")
    merged(folder, tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int32)})
    refused(folder, "of type I32")


def test_fused_matrices_must_have_the_rows_of_their_parts(tmp_path):
    build("phi3").save_pretrained(tmp_path / "stock")
    tensors = stored(tmp_path / "stock")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    merged(tmp_path / "stock", tensors | {name: tensors[name][:-1]})
    refused(tmp_path / "stock", f"'{name}' in")
    merged(tmp_path / "stock", {n: t for n, t in tensors.items() if n != name})
    refused(tmp_path / "stock", f"lacks '{name}'")
    merged(tmp_path / "stock", tensors)
    rewrite(tmp_path / "stock" / "config.json", resid_pdrop=0.1)
    refused(tmp_path / "stock", "resid_pdrop=0.1")


def test_a_full_disk_is_noticed_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: pytest.fail("something was written"))
    refused(folder, "free; make room or choose another disk")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(folder, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.checkpoint, "copy_side_files", fill)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(OSError, match="No space left"):
        convert(str(folder), folder.parent / "result")
    assert sorted(folder.parent.iterdir()) == before


def test_a_result_that_computes_something_else_is_not_kept(folder, monkeypatch):
    convert(str(folder), folder.parent / "ours")
    write, name = checkpoint.write_tensors, "model.norm.weight"

    def changed(folder, tensors, *more):
        write(folder, tensors | {name: replace(tensors[name], load=lambda: tensors[name].load() + 0.5)}, *more)

    monkeypatch.setattr(checkpoint, "write_tensors", changed)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(verification.VerificationError, match="logits of the result differ"):
        convert(str(folder.parent / "ours"), folder.parent / "result", to="llama")
    assert sorted(folder.parent.iterdir()) == before


def test_destinations_and_names(folder, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists; delete it"):
        convert(str(folder), tmp_path / "there")
    for path, to in (("x.gguf", "llama"), ("x", "gguf")):
        with pytest.raises(ValueError, match="does not fit --to"):
            convert(str(folder), tmp_path / path, to=to)
    refused(folder, "--to 'gemma' is unknown", to="gemma")
    refused(folder, "is already a llama checkpoint", to="llama")
    refused(folder, "max_shard_size 'big' is not a size", max_shard_size="big")
    for name, match in ((tmp_path / "absent", "does not exist"), (folder / "config.json", "is a file")):
        with pytest.raises(ValueError, match=match):
            convert(str(name), tmp_path / "result")
    with pytest.raises(ValueError, match="neither a folder here nor a model that the Hub gives us"):
        convert("someone/no-such-model", tmp_path / "result")


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500 MB", "2GiB", "1.5kb", "7")] == [
        5 * 10**9,
        5 * 10**8,
        2 * 2**30,
        1500,
        7,
    ]
    for text in ("", "GB", "-1GB", "0", "5 apples"):
        with pytest.raises(ValueError):
            parse_size(text)

"""A GGUF file in our class with its weights packed, against transformers' own loader, which unpacks them."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from hf_decoder import HfDecoderForCausalLM, HfDecoderModel
from hf_decoder.engine.quantized import loading
from hf_decoder.engine.quantized.layers import PackedEmbedding, PackedLinear
from hf_decoder.engine.switches import settings
from hf_decoder.interop.quantization import tensor_bytes

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'hf-decoder[gguf]'")
import gguf
from gguf_blocks import write_file

needs_kernels = pytest.mark.usefixtures("packed_kernels")
IDS = torch.randint(3, 107, (2, 21), generator=torch.Generator().manual_seed(0))
FIXED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for architecture in ARCHITECTURES:
        write_file(folder / f"{architecture}.gguf", architecture)
    for kind in ("Q8_0", "Q4_0"):
        write_file(folder / f"{kind}.gguf", kind=kind, head=None)
    return folder


def load(folder: Path, name: str, **kwargs: Any) -> Any:
    return HfDecoderForCausalLM.from_pretrained(folder, gguf_file=f"{name}.gguf", **kwargs)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Numbers as products with packed weights have them: in blocks of 32, to 127 steps either way."""
    blocks = x.unflatten(-1, (-1, 32))
    top = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (127 / top)).round() * (top / 127)).view_as(x)


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, "Q8_0", "Q4_0"])
def test_logits_are_those_of_the_stock_model_with_rounded_inputs(name, folder):
    packed = load(folder, name)
    assert not any(type(module) is torch.nn.Linear for module in packed.modules())
    told = {"head_dim": 32} if name == "qwen3" else {}  # transformers does not read it
    stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{name}.gguf", dtype=torch.float32, **told)
    expected = stock(IDS).logits
    dense = load(folder, name, quantization_config={"dequantize": True})
    assert relative_gap(dense(IDS).logits, expected) < 1e-4
    for module in stock.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: rounded(*inputs))
    assert relative_gap(packed(IDS).logits, stock(IDS).logits) < 1e-2


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "Q8_0", "Q4_0"])
def test_memory_is_that_of_the_file(name, folder):
    assert tensor_bytes(load(folder, name)) <= 1.1 * (folder / f"{name}.gguf").stat().st_size


@needs_kernels
def test_a_packed_head_over_layers_that_are_not(folder, monkeypatch):
    monkeypatch.delitem(loading.FORMATS, "Q4_K")
    model = load(folder, "llama")
    assert isinstance(model.lm_head, PackedLinear) and type(model.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    found = model.generate(IDS[:1], cache_implementation="static", **FIXED)
    with settings.override(decoding=False):
        assert found.equal(model.generate(IDS[:1], **FIXED))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["qwen2", "Q4_0"])
def test_generate_gives_the_tokens_of_the_modules(name, cache, dtype, folder):
    model = load(folder, name, dtype=dtype)
    for rows in (1, 2):
        kwargs = FIXED | {"cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True}
        found = model.generate(IDS[:rows], **kwargs)
        slow = copy.deepcopy(model)
        slow.model.norm.register_forward_hook(lambda module, inputs, output: None)
        expected = slow.generate(IDS[:rows], **kwargs)
        gap = relative_gap(torch.stack(found.logits).float(), torch.stack(expected.logits).float())
        assert found.sequences.equal(expected.sequences) or dtype == torch.bfloat16
        assert gap < 0.02 or dtype == torch.bfloat16


@needs_kernels
def test_an_adapter_trains_on_top(folder):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(folder, "llama"), peft.LoraConfig(r=2, init_lora_weights=False))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged into packed GGUF weights; .*dequantize=True"):
            merge()
    dense = load(folder, "llama", quantization_config=GgufConfig(dequantize=True))
    merged = peft.get_peft_model(dense, peft.LoraConfig(r=2, init_lora_weights=False))
    expected = merged(IDS).logits
    torch.testing.assert_close(merged.merge_and_unload()(IDS).logits, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_copies_and_casts_stay_packed(folder, tmp_path):
    model = load(folder, "Q8_0")
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lm_head.weight is other.model.embed_tokens.weight and other(IDS).logits.equal(expected)
    model.to(torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.uint8 and model(IDS).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"hf-decoder convert .* unpacks them"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_names_of_layers_and_of_the_source_are_kept(folder):
    model = load(folder, "Q4_0")
    assert isinstance(model.lm_head, PackedLinear) and isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.name_or_path == str(folder) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.uint8)
    auto = AutoModelForCausalLM.from_pretrained(folder, gguf_file="Q4_0.gguf", config=model.config)
    assert auto(IDS).logits.equal(model(IDS).logits)
    model.config.head_dim = 16
    with pytest.raises(ValueError, match="has head_dim=32; the given config has 16"):
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="Q4_0.gguf", config=model.config)


def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(loading.logger, "warning_once", lines.append)
    return lines


@needs_kernels
@torch.no_grad()
def test_switches_give_the_exact_numbers(folder, monkeypatch):
    lines, packed = said(monkeypatch), load(folder, "qwen2")
    with settings.override(all=False):
        dense = load(folder, "qwen2")
        assert type(dense.lm_head) is torch.nn.Linear and lines[0].endswith("compiled kernels are switched off")
        expected = dense.float()(IDS).logits
        assert relative_gap(packed(IDS).logits, expected) < 1e-4
    assert relative_gap(packed(IDS).logits, expected) > 1e-3


@torch.no_grad()
def test_without_a_compiler_the_file_is_unpacked_and_that_is_said(folder, monkeypatch):
    lines = said(monkeypatch)
    monkeypatch.setattr(loading, "obstacle", lambda: "no C++ compiler was found")
    model = load(folder, "Q8_0")
    assert type(model.lm_head) is torch.nn.Linear
    assert len(lines) == 1 and lines[0].endswith(
        "is unpacked, which takes several times its memory: no C++ compiler was found"
    )


@needs_kernels
def test_types_that_are_not_held_are_named_and_unpacked(folder, tmp_path, monkeypatch):
    lines = said(monkeypatch)
    monkeypatch.delitem(loading.FORMATS, "Q6_K")
    model = load(folder, "llama")
    assert type(model.lm_head) is torch.nn.Linear and isinstance(model.model.embed_tokens, PackedEmbedding)
    assert len(lines) == 1 and "1 tensors of" in lines[0] and lines[0].endswith("of types not held packed: Q6_K")


def test_what_cannot_be_is_refused_in_a_line(folder, tmp_path):
    whole = (folder / "Q4_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is cut short"):
        load(tmp_path, "cut")
    with pytest.raises(OSError, match=r"absent\.gguf"):
        load(folder, "absent")
    with pytest.raises(ValueError, match="HfDecoderModel reads no GGUF file"):
        HfDecoderModel.from_pretrained(folder, gguf_file="Q4_0.gguf")
    with pytest.raises(ValueError, match="is quantized already"):
        load(folder, "Q4_0", quantization_config={"load_in_8bit": True})


@pytest.mark.parametrize("length", [48, 2**31])
@pytest.mark.parametrize("factors", [0, 16])
def test_a_width_of_heads_that_lies_is_refused(length, factors, tmp_path):
    fields = {"attention.key_length": length, "rope.dimension_count": length}
    write_file(tmp_path / "lies.gguf", rope_factors=factors, **fields)
    with pytest.raises(ValueError, match=r"lies\.gguf"):
        load(tmp_path, "lies")


def test_tensors_over_one_another_are_refused(folder, tmp_path):
    whole = (folder / "Q4_0.gguf").read_bytes()
    (tmp_path / "over.gguf").write_bytes(whole)
    for tensor in gguf.GGUFReader(tmp_path / "over.gguf", "r+").tensors:
        tensor.field.parts[-1][0] = 0  # where its bytes begin
    (tmp_path / "over.gguf").write_bytes((tmp_path / "over.gguf").read_bytes()[: len(whole) // 2])
    with pytest.raises(ValueError, match="lie over one another"):
        load(tmp_path, "over")

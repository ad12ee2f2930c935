"""GGUF: read by transformers' own loader and by llama.cpp, and back in."""

import argparse
import copy
import inspect
import json
import math
import pydoc_data.topics
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from stock_models import LLAMA3, SHAPE, YARN, assert_identical, ids, longrope, randomise, rope, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main
from hf_decoder.data.tokenization import train_tokenizer
from hf_decoder.interop import gguf_write
from hf_decoder.interop.checkpoint import LazyTensor
from hf_decoder.interop.conversion import convert
from hf_decoder.interop.verification import VerificationError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'hf-decoder[gguf]'")

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
READS_NO_LLAMA_WITHOUT_BOS = Version(transformers.__version__) < Version("5.18")
TEXT = "def größe(argv):\n\treturn 0 if len(argv) == 12345 else 'the end'  # 東京 привет 🙂  \n\n"
# Rows of 32 and more, which blocks of quantized types divide.
WIDE = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "bos_token_id": None, "head_dim": 16}
CASES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-multi-query": {"num_key_value_heads": 1},
    "llama-theta": rope("default"),
    "qwen2": {"attention_bias": "qkv"},
    "qwen3": {"qk_norm": True, "head_dim": 128},
    "qwen3-tied": {"qk_norm": True, "head_dim": 128, "tie_word_embeddings": True},
}
# What llama.cpp reads, but transformers' loader leaves out.
LLAMA_CPP_CASES = CASES | {
    "llama-bias": {"attention_bias": True},
    "llama-linear": rope("linear", factor=3.0),
    "llama-llama3": LLAMA3,
    "llama-yarn": YARN,
    "qwen3-head-dim": {"qk_norm": True, "head_dim": 24},
}


@pytest.fixture(scope="module")
def text_tokenizer():
    return train_tokenizer([TEXT, "the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=340)


def save(folder, tokenizer, **fields) -> HfDecoderForCausalLM:
    """A random model of ours with its tokenizer, and rows of the embedding table that no token uses."""
    shape = {**SHAPE, "pad_token_id": 1, "eos_token_id": 0, **WIDE, "vocab_size": len(tokenizer) + 4, **fields}
    model = randomise(HfDecoderForCausalLM(HfDecoderConfig(**shape)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_file_with_the_same_logits(case: str, tmp_path, text_tokenizer):
    model = save(tmp_path / "ours", text_tokenizer, **CASES[case])
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype="f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    assert theirs.config.model_type == case.partition("-")[0]
    sample = ids(2, 24, vocab_size=344)
    torch.testing.assert_close(theirs(sample).logits, model(sample).logits, **TOLERANCE)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_the_tokenizer_of_the_file(case: str, tmp_path, text_tokenizer, request):
    if case == "llama":
        reason = "transformers takes the end of a text for its start there, and fails where a Llama has no start"
        mark = pytest.mark.xfail(READS_NO_LLAMA_WITHOUT_BOS, reason=reason, raises=AttributeError, strict=True)
        request.applymarker(mark)
    save(tmp_path / "ours", text_tokenizer, **CASES[case])
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer(TEXT)["input_ids"] == text_tokenizer(TEXT)["input_ids"]
    assert tokenizer.chat_template == text_tokenizer.chat_template


@pytest.mark.parametrize("case", LLAMA_CPP_CASES)
def test_back_in_every_tensor_is_identical(case: str, tmp_path, text_tokenizer):
    model = save(tmp_path / "ours", text_tokenizer, **LLAMA_CPP_CASES[case])
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype="f32")
    assert convert(str(tmp_path / "model.gguf"), tmp_path / "back") == "HfDecoderForCausalLM"
    assert_identical(stored(tmp_path / "back"), stored(tmp_path / "ours"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    sample = ids(2, 24, vocab_size=344)
    with torch.no_grad():
        torch.testing.assert_close(back(sample).logits, model(sample).logits, **TOLERANCE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    chat = text_tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    for text in (TEXT, chat, "<|endoftext|> <|im_end|>"):
        assert tokenizer(text)["input_ids"] == text_tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", "<|pad|>", None)


# Largest error of a value, relative to the largest value of its block: half a step of rounding.
ERRORS = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.5 / 127 + 2.0**-10, "q4_0": 1 / 8 + 2.0**-10}


@pytest.mark.parametrize("outtype", ERRORS)
def test_every_type_holds_the_values_within_its_rounding(outtype: str, tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype)
    convert(str(tmp_path / "model.gguf"), tmp_path / "back")
    before, after = stored(tmp_path / "ours"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kind = "f32" if tensor.ndim == 1 else outtype
        if outtype in ("f16", "bf16"):
            kind = outtype  # a file's tensors come back in the type of its embedding table
        if outtype == "q4_0" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            kind = "q8_0"
        if outtype == "f16" or outtype == "bf16":
            assert after[name].dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[outtype]
        blocks = tensor.reshape(-1, 32)
        error = (after[name].float().reshape(-1, 32) - blocks).abs().amax(-1) / blocks.abs().amax(-1)
        assert error.max() <= ERRORS[kind], name
    sizes = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
    matrices = sum(t.numel() for n, t in before.items() if t.ndim == 2 and "layers" in n)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    held = sum(int(t.n_bytes) for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    assert held == matrices * sizes[outtype]


def damaged(folder, name: str, value: float) -> None:
    tensors = stored(folder)
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "outtype", "words"),
    [
        (float("nan"), "f32", "holds values that are not finite"),
        (float("-inf"), "q8_0", "holds values that are not finite"),
        (7e4, "f16", "holds 70000, too large for f16; choose --outtype bf16 or f32"),
        (-1e7, "q4_0", "holds 1e\\+07, too large for q4_0"),
        (7e4, "bf16", None),
        (7e4, "q8_0", None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_that_a_type_cannot_hold_are_refused(value, outtype, words, tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer)
    damaged(tmp_path / "ours", "model.layers.1.mlp.up_proj.weight", value)
    if words is None:
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype)
        return
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj.weight {words}"):
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("outtype", ERRORS)
def test_tiny_numbers_are_within_the_rounding(outtype: str, tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer)
    tensors = stored(tmp_path / "ours")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-6
    tensors["model.layers.0.mlp.gate_proj.weight"].zero_()
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("number", "up_proj.weight differs by"),
        ("field", "the file says num_attention_heads"),
        ("angles", "by other angles"),
        ("ids", "gives other ids"),
    ],
)
@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
def test_a_file_that_does_not_hold_the_source_is_not_kept(
    damage: str, words: str, outtype: str, tmp_path, text_tokenizer, monkeypatch
):
    """What is written goes wrong in one place each."""
    write = gguf_write.write

    def wrong(path, name, plan, vocabulary, progress):
        tensors, config = dict(plan.tensors), copy.deepcopy(plan.config)
        if damage == "number":
            up = tensors["blk.1.ffn_up.weight"]
            changed = up.load().clone()
            changed[3] *= 1.5
            tensors["blk.1.ffn_up.weight"] = LazyTensor(up.shape, up.dtype, lambda: changed)
        elif damage == "field":
            config.num_attention_heads *= 2
        elif damage == "angles":
            config.rope_parameters["rope_theta"] *= 2
        else:
            vocabulary = replace(vocabulary, merges=vocabulary.merges[:-9])
        write(path, name, replace(plan, tensors=tensors, config=config), vocabulary, progress)

    monkeypatch.setattr(gguf_write, "write", wrong)
    save(tmp_path / "ours", text_tokenizer)
    with pytest.raises(VerificationError, match=words):
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype=outtype, verify=False)


def test_ids_of_a_tokenizer_may_leave_gaps_but_not_pass_the_table(tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer)
    path = tmp_path / "ours" / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    for moved, fits in ((vocabulary[last] + 3, True), (vocabulary[last] + 300, False)):
        vocabulary[last] = moved
        path.write_text(json.dumps(values), encoding="utf-8")
        if fits:
            convert(str(tmp_path / "ours"), tmp_path / "gaps.gguf", to="gguf")
        else:
            with pytest.raises(ValueError, match=f"the tokenizer has ids up to {moved}, but vocab_size is"):
                convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sliding_window": 7}, "sliding_window=7"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"qk_norm": True, "attention_bias": True}, "attention_bias=True with qk_norm=True"),
        (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (rope("dynamic", factor=2.0), "rope_type='dynamic'"),
        (longrope(8), "rope_type='longrope'"),
        (rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0), "beta_fast"),
    ],
)
def test_what_no_graph_computes_is_refused_with_the_field(fields: dict, field: str, tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer, **fields)
    with pytest.raises(ValueError) as error:
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")
    assert field in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_window_as_long_as_the_context_is_no_obstacle(tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer, sliding_window=64)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    save(tmp_path / "ours", train_tokenizer([TEXT], tokenizer_type="char"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")
    (tmp_path / "ours" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")


@pytest.mark.parametrize("name", ["llama-bpe", "gpt-2", "smollm", "qwen2"])
def test_other_byte_level_tokenizers_come_back(name: str, tmp_path):
    from tokenizers import Regex, pre_tokenizers

    from hf_decoder.interop.gguf_names import LLAMA3_SPLIT, QWEN2_OWN_SPLIT

    tokenizer = train_tokenizer([TEXT * 3], vocab_size=320)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    split = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_OWN_SPLIT}
    if name in split:
        steps = [pre_tokenizers.Split(Regex(split[name]), behavior="isolated"), byte_level]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level] if name == "smollm" else [byte_level]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    save(tmp_path / "ours", tokenizer)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == name
    convert(str(tmp_path / "model.gguf"), tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_a_damaged_or_foreign_file_is_one_line(tmp_path, text_tokenizer):
    save(tmp_path / "ours", text_tokenizer)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for name, content in (("short", whole[: len(whole) // 2]), ("empty", b""), ("text", b"no such thing" * 9)):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="is not a GGUF file, or is cut short"):
            convert(str(tmp_path / f"{name}.gguf"), tmp_path / "back")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='gpt2'"):
        convert(str(tmp_path / "other.gguf"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def header(fields: list[bytes], tensors: Sequence[bytes] = (), counts: tuple[int, int] | None = None) -> bytes:
    tensor_count, field_count = counts or (len(tensors), len(fields))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, field_count) + b"".join([*fields, *tensors])


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def array(kind: int, count: int) -> bytes:
    return field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", kind, count))


@pytest.mark.parametrize(
    "content",
    [
        header([array(8, 2**40)]),
        header([array(8, 2**63)]),
        header([array(0, 2**40)]),
        header([array(9, 1) + struct.pack("<IQ", 9, 2**40)]),
        header([field("a", 9, struct.pack("<IQ", 9, 1) * 1000)]),
        header([array(77, 1)]),
        header([field("a", 99, b"")]),
        header([field("a", 8, struct.pack("<Q", 2**63))]),
        header([], counts=(2**63, 0)),
        header([], counts=(0, 2**64 - 1)),
        header([field("a", 0, b"\0")] * 2),
        header([field("general.alignment", 4, struct.pack("<I", 0))]),
        header([field("general.alignment", 8, struct.pack("<Q", 1) + b"x")]),
        header([], [struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)]),
        header([], [struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0)]),
        header([], [struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 2**40, 0, 0, 0)]),
        header([], [struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 1, 1, 9999, 0)]),
        header([], [struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 1, 1, 0, 2**63)]),
        header([struct.pack("<Q", 1) + b"\xff" + b"\0" * 8]),
    ],
)
def test_counts_are_held_against_the_bytes_that_are_there(tmp_path, capsys, content):
    (tmp_path / "hostile.gguf").write_bytes(content)
    start = time.process_time()
    assert main(["convert", str(tmp_path / "hostile.gguf"), str(tmp_path / "back")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "is not a GGUF file, or is cut short" in line and "Traceback" not in line
    assert time.process_time() - start < 2 and not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token_id", -5), ("eos_token_id", 2**31), ("bos_token_id", 10**6), ("padding_token_id", "end")],
)
def test_special_ids_must_be_tokens(tmp_path, text_tokenizer, capsys, monkeypatch, key, value):
    save(tmp_path / "ours", text_tokenizer)
    header_of = gguf.GGUFWriter.write_header_to_file

    def counted(self, *args, **kwargs):
        self.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.INT64
        self.add_key_value(f"tokenizer.ggml.{key}", value, kind)
        header_of(self, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", counted)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", verify=False)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "back")]) == 2
    assert "token_id" in (line := capsys.readouterr().err) and line.count("\n") == 1


def real_lines(count: int) -> list[str]:
    """Sentences in 34 languages, English prose of the manual that comes with Python, and code of its library."""
    sentences = (Path(__file__).parent / "languages.txt").read_text(encoding="utf-8")
    lines = [*sentences.splitlines(), *(line for line in TEXT.splitlines() if line)]
    prose = "\n".join(pydoc_data.topics.topics.values())
    lines += [line for line in prose.splitlines() if len(line) > 40][:400]
    for module in (json.decoder, argparse):
        lines += [line for line in inspect.getsource(module).splitlines() if line.strip()]
    return lines[:count]


@pytest.mark.parametrize("case", LLAMA_CPP_CASES)
def test_llama_cpp_gives_the_same_text_and_log_probabilities(case: str, tmp_path, text_tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    model = save(tmp_path / "ours", text_tokenizer, **LLAMA_CPP_CASES[case] | {"max_position_embeddings": 256})
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype="f32")
    fp32 = llama_cpp.GGML_TYPE_F32  # of the cache, which is of half precision otherwise
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=256, logits_all=True, type_k=fp32, type_v=fp32, verbose=False, n_threads=1
    )
    prompt = text_tokenizer("def größe(argv):")["input_ids"]
    with torch.no_grad():
        ours = model.generate(torch.tensor([prompt]), max_new_tokens=200, min_new_tokens=200, do_sample=False)[0]
        log_probabilities = model(ours[None, :-1]).logits[0].log_softmax(-1)
    llama.reset()
    llama.eval(ours[:-1].tolist())
    theirs = torch.from_numpy(np.array(llama.scores[: len(ours) - 1])).log_softmax(-1)
    torch.testing.assert_close(theirs, log_probabilities, rtol=0.0, atol=1e-3)
    # min_new_tokens forbids the end of text in ours alone
    allowed = theirs.clone()
    allowed[:, text_tokenizer.eos_token_id] = -math.inf
    assert torch.equal(allowed[len(prompt) - 1 :].argmax(-1), ours[len(prompt) :])


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, text_tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    save(tmp_path / "ours", text_tokenizer)
    convert(str(tmp_path / "ours"), tmp_path / "model.gguf", to="gguf", outtype="f16")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    lines = real_lines(1000)
    assert len(lines) == 1000
    for line in lines:
        theirs = llama.tokenize(line.encode(), add_bos=False, special=False)
        assert theirs == text_tokenizer(line, split_special_tokens=True)["input_ids"], line
    chat = text_tokenizer.apply_chat_template([{"role": "user", "content": "größe?"}], tokenize=False)
    assert llama.tokenize(chat.encode(), add_bos=False, special=True) == text_tokenizer(chat)["input_ids"]

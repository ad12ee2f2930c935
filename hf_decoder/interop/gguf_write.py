"""Writes a GGUF file that llama.cpp, Ollama and LM Studio run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_decoder.interop import gguf_names as names
from hf_decoder.interop.checkpoint import LazyTensor, Tensors
from hf_decoder.interop.families import BuiltConfig
from hf_decoder.safety.terminal import first_line

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# Embeddings and head keep 8 bits where the rest has 4: their errors reach every token.
KEPT = {"q4_0": "q8_0"}


@dataclass(frozen=True)
class Plan:
    """The content of a file to write. `types` are names of GGML types."""

    config: BuiltConfig
    architecture: str
    outtype: str
    tensors: Tensors
    types: dict[str, str]
    num_bytes: int


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level tokenizer in the terms of GGUF."""

    pre_tokenizer: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None

    @property
    def num_bytes(self) -> int:
        """Its size in the file: each string has 8 bytes of length in front, each token 4 bytes of type behind."""
        return sum(len(text.encode()) + 12 for text in (*self.tokens, *self.merges, self.chat_template or ""))


def require_package() -> Any:
    """The `gguf` package.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF needs the package gguf: pip install 'hf-decoder[gguf]'") from None
    return gguf


def plan(config: BuiltConfig, tensors: Tensors, outtype: str) -> Plan:
    """Plans the names, shapes and types of the file's tensors.

    Raises:
        ValueError: naming a field that no graph of llama.cpp computes.
    """
    gguf = require_package()
    architecture = _architecture(config)
    permuted = names.ARCHITECTURES[architecture].permuted
    renamed = {
        names.to_gguf(name): _permute(tensor, names.permuted_heads(name, config)) if permuted else tensor
        for name, tensor in tensors.items()
    }
    if config.rope_parameters["rope_type"] == "llama3":
        factors = llama3_factors(config)
        renamed[names.ROPE_FREQUENCIES] = LazyTensor(tuple(factors.shape), factors.dtype, lambda: factors)
    types, num_bytes = {}, 0
    for name, tensor in renamed.items():
        types[name] = _type(gguf, name, tensor.shape, outtype)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[types[name]]]
        num_bytes += math.prod(tensor.shape) // block * size + gguf.GGUF_DEFAULT_ALIGNMENT
    return Plan(config, architecture, outtype, renamed, types, num_bytes)


def _architecture(config: BuiltConfig) -> str:
    reason = _obstacle(config)
    if reason is not None:
        raise ValueError(f"llama.cpp has no graph for {reason}")
    for name, architecture in names.ARCHITECTURES.items():
        if architecture.qk_norm == config.qk_norm and config.attention_bias in architecture.attention_biases:
            return name
    raise ValueError(
        f"llama.cpp has no graph for attention_bias={config.attention_bias!r} with qk_norm={config.qk_norm}"
    )


def _obstacle(config: BuiltConfig) -> str | None:
    for name, value in names.FIXED.items():
        if getattr(config, name) != value:
            return f"{name}={getattr(config, name)!r}"
    rope = config.rope_parameters
    if "sliding_attention" in config.layer_types and config.sliding_window < config.max_position_embeddings:
        return f"sliding_window={config.sliding_window}"
    if config.no_rope_layers is not None and not all(config.no_rope_layers):
        return f"no_rope_layers={config.no_rope_layers}"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return f"partial_rotary_factor={rope['partial_rotary_factor']}"
    if rope["rope_type"] not in names.ROPE_TYPES:
        return f"rope_type={rope['rope_type']!r}"
    told = {"rope_type", "rope_theta", "partial_rotary_factor", *names.ROPE_TYPES[rope["rope_type"]]}
    surplus = sorted(name for name in rope if name not in told and rope[name] is not None)
    # The context before scaling does not matter to types that do not read it.
    surplus = [name for name in surplus if name != "original_max_position_embeddings"]
    return f"rope_parameters[{surplus[0]!r}]={rope[surplus[0]]}" if surplus else None


def _permute(tensor: LazyTensor, heads: int | None) -> LazyTensor:
    if heads is None:
        return tensor
    return LazyTensor(tensor.shape, tensor.dtype, lambda: names.interleave(tensor.load(), heads))


def llama3_factors(config: BuiltConfig) -> torch.Tensor:
    """The factors by which llama.cpp divides the plain frequencies."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents / scaled


def _type(gguf: Any, name: str, shape: tuple[int, ...], outtype: str) -> str:
    if len(shape) == 1:  # llama.cpp wants norms and biases in F32
        return "F32"
    if name.startswith(("token_embd.", "output.")):
        outtype = KEPT.get(outtype, outtype)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[outtype.upper()]]
    return outtype.upper() if shape[-1] % block == 0 else "F16"


def read_vocabulary(folder: Path, config: BuiltConfig) -> Vocabulary:
    """Reads the tokenizer in `folder`. An embedding without a token gets a filler.

    Raises:
        ValueError: if there is none, or llama.cpp would split text in another way.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json, and a GGUF file cannot run without a tokenizer")
    try:
        backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        pre_tokenizer = _pre_tokenizer(backend)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if pre_tokenizer is None:
        raise ValueError(
            f"llama.cpp does not know the tokenizer in {folder}: it must be byte-level BPE that splits text as "
            f"{', '.join([*names.SPLITS, names.GPT2, names.SMOLLM])} do"
        )
    highest = max([len(tokenizer) - 1, *tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])
    if highest >= config.vocab_size:  # ids may have gaps
        raise ValueError(f"the tokenizer has ids up to {highest}, but vocab_size is {config.vocab_size}")
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    token_types = [names.UNUSED] * config.vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], token_types[i] = token, names.NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i], token_types[i] = added.content, names.CONTROL if added.special else names.USER_DEFINED
    ids = tokenizer("a")["input_ids"]
    kinds = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    template = tokenizer.chat_template
    return Vocabulary(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        token_types=token_types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]],
        special_ids={kind: i for kind, i in kinds.items() if i is not None},
        flags={
            "add_bos_token": kinds["bos"] is not None and ids[0] == kinds["bos"],
            "add_eos_token": kinds["eos"] is not None and ids[-1] == kinds["eos"],
            "add_space_prefix": False,
        },
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _pre_tokenizer(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a tokenizer.json splits text, or None."""
    model, normalizer = backend["model"], backend.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model["merges"]:
        return None
    if normalizer is not None and normalizer["type"] != "NFC":  # Qwen2 has NFC, which llama.cpp leaves out
        return None
    outer = backend.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_expression = steps[-1].get("use_regex", True)
    kinds = [step["type"] for step in steps[:-1]]
    if kinds == ["Split"] and not own_expression and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        expression = steps[0]["pattern"].get("Regex")
        return next((name for name, known in names.SPLITS.items() if expression in known), None)
    if not kinds and own_expression:
        return names.GPT2
    if kinds == ["Digits"] and steps[0]["individual_digits"] and own_expression:
        return names.SMOLLM
    return None


def write(path: Path, model_name: str, plan: Plan, vocabulary: Vocabulary, progress: Callable[[int], object]) -> None:
    """Writes the file, one tensor in memory at a time.

    Raises:
        ValueError: naming a tensor with values that are not finite, or too large for its type in the file.
    """
    gguf = require_package()
    with closing(gguf.GGUFWriter(path, plan.architecture)) as writer:
        writer.add_name(model_name)
        _add_config(gguf, writer, plan)
        _add_vocabulary(writer, vocabulary)
        for name, tensor in plan.tensors.items():
            kind = gguf.GGMLQuantizationType[plan.types[name]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = math.prod(tensor.shape) // block * size
            stored = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            writer.add_tensor_info(name, stored, gguf.np.dtype("uint8"), num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in plan.tensors.items():
            data = _in_type(gguf, name, tensor.load().to(torch.float32).contiguous().numpy(), plan.types[name])
            writer.write_tensor_data(data)
            progress(data.nbytes)


def _in_type(gguf: Any, name: str, values: Any, kind: str) -> Any:
    """Converts fp32 values to the bytes of a GGML type. Raises ValueError where numpy would write infinity."""
    np, ours = gguf.np, names.to_ours(name) or name
    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(largest):
        raise ValueError(f"{ours} holds values that are not finite, and no runtime can compute with them")
    with np.errstate(over="ignore", invalid="ignore"):
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        fits = kind == "F32" or np.isfinite(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])).all()
    if not fits:
        raise ValueError(f"{ours} holds {largest:g}, too large for {kind.lower()}; choose --outtype bf16 or f32")
    return data


def _add_config(gguf: Any, writer: Any, plan: Plan) -> None:
    config = plan.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType[_file_type(plan.outtype)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if rope["rope_type"] == "llama3":
        writer.add_string(names.ROPE_KEY, json.dumps(rope))


def _file_type(outtype: str) -> str:
    return "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    for kind, i in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", i)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)

"""GGUF in: a llama.cpp file of one of the graphs that we share, its tokenizer included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_decoder.interop import gguf_names as names
from hf_decoder.interop.checkpoint import LazyTensor, Tensors
from hf_decoder.interop.families import BuiltConfig
from hf_decoder.interop.gguf_write import require_package
from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig

# What the file's types become. Quantized matrices become fp32, which holds their values exactly.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our field -> key under the architecture's name.
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
EMBEDDING = "token_embd.weight"


def read(path: Path) -> tuple[BuiltConfig, Tensors, Callable[[Path], None]]:
    """Config, tensors under our names, and what writes the tokenizer into a folder.

    Raises:
        ValueError: if the file is damaged, or of another architecture than those held here.
    """
    gguf = require_package()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is no GGUF file, or is cut short ({error})") from None
    architecture = metadata.get("general.architecture")
    if architecture not in names.ARCHITECTURES:
        raise ValueError(
            f"{path} has general.architecture={architecture!r}; held are {', '.join(names.ARCHITECTURES)}"
        )
    config = _config(path, architecture, metadata, stored)
    return config, _tensors(gguf, path, architecture, config, stored), _tokenizer_writer(path, metadata)


def _config(path: Path, architecture: str, metadata: dict[str, Any], stored: dict[str, Any]) -> BuiltConfig:
    graph = names.ARCHITECTURES[architecture]
    if metadata.get(f"{architecture}.expert_count"):
        count = metadata[f"{architecture}.expert_count"]
        raise ValueError(f"{path} has {architecture}.expert_count={count}, a mixture of experts: not held here")
    absent = [key for key in KEYS.values() if f"{architecture}.{key}" not in metadata]
    absent = [key for key in absent if key != "attention.head_count_kv"]
    if absent or EMBEDDING not in stored:
        raise ValueError(f"{path} lacks {f'{architecture}.{absent[0]}' if absent else EMBEDDING}")
    values: dict[str, Any] = {name: metadata.get(f"{architecture}.{key}") for name, key in KEYS.items()}
    bias = "blk.0.attn_q.bias" in stored
    attention_bias = bias and ("qkv" if "blk.0.attn_output.bias" not in stored else True)
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")}
    # sizes come innermost first
    vocab_size = int(stored[EMBEDDING].shape[1])
    return HfDecoderConfig(
        **values,
        vocab_size=vocab_size,
        head_dim=metadata.get(f"{architecture}.attention.key_length"),
        qk_norm=graph.qk_norm,
        attention_bias=attention_bias,
        tie_word_embeddings="output.weight" not in stored,
        rope_parameters=_rope(path, architecture, metadata, stored),
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        dtype=DTYPES.get(stored[EMBEDDING].tensor_type.name, torch.float32),
    )


def _rope(path: Path, architecture: str, metadata: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    if names.ROPE_KEY in metadata:
        return json.loads(metadata[names.ROPE_KEY])
    if names.ROPE_FREQUENCIES in stored:
        raise ValueError(
            f"{path} scales RoPE by the tensor {names.ROPE_FREQUENCIES} and does not say by which rule; convert the "
            "original checkpoint"
        )
    prefix = f"{architecture}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}freq_base", 10000.0)}
    kind = metadata.get(f"{prefix}scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": metadata.get(f"{prefix}scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = metadata.get(f"{prefix}scaling.original_context_length")
    return rope


def _tensors(gguf: Any, path: Path, architecture: str, config: BuiltConfig, stored: dict[str, Any]) -> Tensors:
    permuted = names.ARCHITECTURES[architecture].permuted

    def loader(name: str, theirs: Any) -> Callable[[], torch.Tensor]:
        heads = names.permuted_heads(name, config) if permuted else None

        def load() -> torch.Tensor:
            if theirs.tensor_type.name == "BF16":
                tensor = torch.from_numpy(theirs.data.copy()).view(torch.bfloat16)
            elif theirs.tensor_type.name in DTYPES:
                tensor = torch.from_numpy(theirs.data.copy())
            else:
                tensor = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type))
            tensor = tensor.reshape(shape).to(config.dtype)
            return tensor if heads is None else names.separate(tensor, heads)

        shape = tuple(int(size) for size in reversed(theirs.shape))
        return load

    tensors = {}
    for theirs_name, theirs in stored.items():
        if theirs_name == names.ROPE_FREQUENCIES:
            continue
        name = names.to_ours(theirs_name)
        if name is None:
            raise ValueError(f"{path} holds the tensor {theirs_name!r}, which is not held here")
        shape = tuple(int(size) for size in reversed(theirs.shape))
        tensors[name] = LazyTensor(shape, config.dtype, loader(name, theirs))
    return tensors


def _tokenizer_writer(path: Path, metadata: dict[str, Any]) -> Callable[[Path], None]:
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    known = (*names.SPLITS, names.GPT2, names.SMOLLM)
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre_tokenizer not in known:
        kind = f"{metadata.get('tokenizer.ggml.model')!r} with pre-tokenizer {pre_tokenizer!r}"
        raise ValueError(f"{path} has a tokenizer of type {kind}; held are 'gpt2' with {', '.join(known)}")

    def write(folder: Path) -> None:
        _tokenizer(metadata, pre_tokenizer).save_pretrained(folder)

    return write


def _tokenizer(metadata: dict[str, Any], pre_tokenizer: str) -> PreTrainedTokenizerFast:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != names.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_tokenizer == "llama-bpe"))
    steps: list[Any] = []
    if pre_tokenizer in names.SPLITS:
        steps.append(pre_tokenizers.Split(Regex(names.SPLITS[pre_tokenizer][0]), behavior="isolated"))
    elif pre_tokenizer == names.SMOLLM:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer not in names.SPLITS))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")}
    special = {kind: tokens[i] for kind, i in ids.items() if i is not None}
    ends: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    front = special.get("bos") if metadata.get("tokenizer.ggml.add_bos_token") else None
    back = special.get("eos") if metadata.get("tokenizer.ggml.add_eos_token") else None
    if front or back:
        template = " ".join(part for part in (front, "$A", back) if part)
        pairs = [(token, tokens.index(token)) for token in (front, back) if token]
        ends.append(processors.TemplateProcessing(single=template, special_tokens=pairs))
    backend.post_processor = processors.Sequence(ends) if len(ends) > 1 else ends[0]
    for i, token in enumerate(tokens):
        if types[i] in (names.CONTROL, names.USER_DEFINED):
            control = types[i] == names.CONTROL
            add = backend.add_special_tokens if control else backend.add_tokens
            add([AddedToken(token, special=control, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special.get("bos"),
        eos_token=special.get("eos"),
        pad_token=special.get("padding"),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer

"""Reads a GGUF file of a llama.cpp graph that our model covers, its tokenizer included."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_decoder.interop import gguf_names as names
from hf_decoder.interop.checkpoint import LazyTensor, PackedTensor, Tensors, parse_json
from hf_decoder.interop.families import BuiltConfig
from hf_decoder.interop.gguf_file import StoredTensor, read_file
from hf_decoder.interop.gguf_write import Plan, llama3_factors, require_package
from hf_decoder.interop.verification import VerificationError, text_ids
from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
from hf_decoder.model.modeling_hf_decoder import HfDecoderRotaryEmbedding

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
SPECIAL_IDS = ("bos", "eos", "padding")
# Fields that the tensors and their names tell.
TOLD = ("vocab_size", "head_dim", "qk_norm", "attention_bias", "tie_word_embeddings")
# Half a step of each type, of a value itself or of the largest in its block, and what rounding the scale adds.
ERRORS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-10, "Q4_0": 1 / 8 + 2.0**-10}
BLOCK, LEVELS = 32, 127
FLOOR = 2.0**-25  # half the smallest step of fp16, in which scales are kept too
FIELD_ERROR = 1e-6  # the file's numbers are fp32


def read(path: Path) -> tuple[BuiltConfig, Tensors, Callable[[Path], None]]:
    """Config, tensors under our names, and what writes the tokenizer into a folder.

    Raises:
        ValueError: if the file is damaged, or of another architecture or with another tokenizer than those held here.
    """
    config, tensors, metadata = read_model(path)
    return config, tensors, _tokenizer_writer(path, metadata, config.vocab_size)


def read_model(path: Path) -> tuple[BuiltConfig, Tensors, dict[str, Any]]:
    """Config, tensors under our names, and all fields of the file, whatever its tokenizer is.

    Raises:
        ValueError: if the file is damaged, or of another architecture than those held here.
    """
    gguf = require_package()
    metadata, stored = read_file(path, gguf)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in names.ARCHITECTURES:
        raise ValueError(
            f"{path} has general.architecture={architecture!r}; held are {', '.join(names.ARCHITECTURES)}"
        )
    config = _config(path, architecture, metadata, stored)
    return config, _tensors(gguf, path, architecture, config, stored), metadata


def verify(path: Path, plan: Plan, tensors: Tensors, folder: Path) -> None:
    """Reads the file back: its fields, the ids that its tokenizer gives, and its numbers must be those of the source.

    Args:
        plan: by which it was written.
        tensors: of the source, under our names.
        folder: which holds the source's tokenizer.

    Raises:
        VerificationError: naming what is not as it was, by more than the rounding of its type.
    """
    config, found, write_tokenizer = read(path)
    for name in (*KEYS, *TOLD):
        ours, theirs = getattr(plan.config, name), getattr(config, name)
        if ours != theirs and not (isinstance(ours, float) and abs(ours - theirs) <= FIELD_ERROR * abs(ours)):
            raise VerificationError(f"the file says {name}={theirs!r}; the source has {ours!r}")
    angles = [_rotation(config) for config in (plan.config, config)]
    if not torch.allclose(angles[0], angles[1], rtol=FIELD_ERROR, atol=0):
        raise VerificationError("the file rotates queries and keys by other angles than the source")
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch))
        if text_ids(Path(scratch)) != text_ids(folder):
            raise VerificationError("the tokenizer of the file gives other ids than that of the source")
    if found.keys() != tensors.keys():
        raise VerificationError(f"the file lacks or adds tensors: {sorted(found.keys() ^ tensors.keys())[0]}")
    for name, tensor in tensors.items():
        kind = plan.types[names.to_gguf(name)]
        # what is read comes in the type of the embedding table, norms too
        error = max(ERRORS[kind], torch.finfo(found[name].dtype).eps / 2 if kind == "F32" else 0.0)
        gap = _relative_gap(tensor.load().float(), found[name].load().float(), in_blocks=kind.startswith("Q"))
        if not gap <= error:  # also when it is not a number
            raise VerificationError(f"{name} differs by {gap:.1e} from the source's; {kind} explains {error:.1e}")


def _rotation(config: BuiltConfig) -> torch.Tensor:
    """All frequencies, and what cosines and sines are multiplied by."""
    rotation: Any = HfDecoderRotaryEmbedding(config)
    return torch.cat((rotation.inv_freq, torch.tensor([rotation.attention_scaling])))


def _relative_gap(before: torch.Tensor, after: torch.Tensor, *, in_blocks: bool) -> float:
    """The largest difference, relative to the number itself or to the largest of its block."""
    scale, floor = before.abs(), FLOOR
    if in_blocks:
        scale = scale.view(-1, BLOCK).amax(-1, keepdim=True).expand(-1, BLOCK).reshape(before.shape)
        floor *= LEVELS
    gap = ((before - after).abs() - floor) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return float(gap.max().clamp(min=0.0))


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
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in SPECIAL_IDS}
    if len(stored[EMBEDDING].shape) != 2:
        raise ValueError(f"{path} has {EMBEDDING} of {len(stored[EMBEDDING].shape)} dimensions; it must be a matrix")
    vocab_size = stored[EMBEDDING].shape[1]  # sizes come innermost first
    fields: dict[str, Any] = dict(
        **values,
        vocab_size=vocab_size,
        head_dim=metadata.get(f"{architecture}.attention.key_length"),
        qk_norm=graph.qk_norm,
        attention_bias=attention_bias,
        tie_word_embeddings="output.weight" not in stored,
        rope_parameters=_rope(path, architecture, metadata, stored),
        sliding_window=metadata.get(f"{architecture}.attention.sliding_window") or None,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        dtype=DTYPES.get(stored[EMBEDDING].tensor_type.name, torch.float32),
    )
    try:
        config: BuiltConfig = HfDecoderConfig(**fields)
        factors = None if names.ROPE_KEY in metadata else stored.get(names.ROPE_FREQUENCIES)
        if factors is not None:
            told = factors.data.reshape(-1)
            rope = {"rope_type": "llama3", "factor": float(np.max(told))} | names.META_ROPE
            is_partial = "partial_rotary_factor" in fields["rope_parameters"]
            config = HfDecoderConfig(**fields | {"rope_parameters": fields["rope_parameters"] | rope})
            fits = 2 * len(told) == config.head_dim and not is_partial  # asked first: head_dim is the file's claim
            if not (fits and np.allclose(llama3_factors(config).numpy(), told, rtol=1e-4)):
                raise ValueError(
                    f"it scales RoPE by {names.ROPE_FREQUENCIES} in another way than Llama 3; convert the original"
                )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} describes no model that can be: {error}") from None
    return config


def _rope(path: Path, architecture: str, metadata: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    if names.ROPE_KEY in metadata:
        return parse_json(metadata[names.ROPE_KEY], f"{names.ROPE_KEY} in {path}")
    prefix = f"{architecture}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}freq_base", 10000.0)}
    kind = metadata.get(f"{prefix}scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": metadata.get(f"{prefix}scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = metadata.get(f"{prefix}scaling.original_context_length")
    long = {name: stored[theirs].data for name, theirs in names.LONG_FACTORS.items() if theirs in stored}
    if len(long) == len(names.LONG_FACTORS):
        rope |= {"rope_type": "longrope"} | {name: data.reshape(-1).tolist() for name, data in long.items()}
        rope["original_max_position_embeddings"] = metadata.get(f"{prefix}scaling.original_context_length")
        rope["attention_factor"] = metadata.get(f"{prefix}scaling.attn_factor")
    rotated, width = metadata.get(f"{prefix}dimension_count"), metadata.get(f"{architecture}.attention.key_length")
    heads, size = (metadata.get(f"{architecture}.{KEYS[name]}") for name in ("num_attention_heads", "hidden_size"))
    if isinstance(rotated, int) and isinstance(size, int) and isinstance(heads, int) and heads > 0 < rotated:
        width = width if isinstance(width, int) and width > 0 else max(size // heads, 1)
        if rotated != width and names.ARCHITECTURES[architecture].permuted:
            raise ValueError(f"{path} rotates {rotated} of {width} dimensions of a head, which is not held here")
        if rotated != width:
            rope["partial_rotary_factor"] = rotated / width
    return rope


def _tensors(gguf: Any, path: Path, architecture: str, config: BuiltConfig, stored: dict[str, Any]) -> Tensors:
    graph = names.ARCHITECTURES[architecture]
    tensors = {}
    for theirs_name, theirs in stored.items():
        if theirs_name in (names.ROPE_FREQUENCIES, *names.LONG_FACTORS.values()):
            continue
        parts = names.fused_parts(theirs_name, config) if graph.fused else {}
        if not parts:
            name = names.to_ours(theirs_name)
            if name is None:
                raise ValueError(f"{path} holds the tensor {theirs_name!r}, which is not held here")
            parts = {name: theirs.shape[-1]}
        elif sum(parts.values()) != theirs.shape[-1]:
            raise ValueError(
                f"{path} has {theirs.shape[-1]} rows in {theirs_name!r}; its fields ask for {sum(parts.values())}"
            )
        if theirs.tensor_type.name not in DTYPES:
            _check_readable(gguf, path, theirs_name, theirs)
        start = 0
        for name, rows in parts.items():
            heads = names.permuted_heads(name, config) if graph.permuted else None
            tensors[name] = _tensor(gguf, theirs, slice(start, start + rows), heads, config.dtype)
            start += rows
    return tensors


def _tensor(gguf: Any, theirs: StoredTensor, rows: slice, heads: int | None, dtype: torch.dtype) -> LazyTensor:
    """Those rows of a tensor of the file, in our order, which differs from theirs within so many heads."""
    kind = theirs.tensor_type.name
    shape = (rows.stop - rows.start, *reversed(theirs.shape[:-1]))

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if heads is None else names.separate(tensor, heads)

    def load_blocks() -> torch.Tensor:
        return ordered(torch.from_numpy(theirs.data[rows].copy()))

    def load() -> torch.Tensor:
        if kind == "BF16":
            tensor = torch.from_numpy(theirs.data[rows].copy()).view(torch.bfloat16)
        elif kind in DTYPES:
            tensor = torch.from_numpy(theirs.data[rows].copy())
        else:
            tensor = torch.from_numpy(gguf.dequantize(theirs.data[rows], theirs.tensor_type))
        return ordered(tensor.reshape(shape).to(dtype))

    if kind in DTYPES or len(shape) != 2:
        return LazyTensor(shape, dtype, load)
    return PackedTensor(shape, dtype, load, kind, load_blocks)


def _check_readable(gguf: Any, path: Path, name: str, theirs: StoredTensor) -> None:
    try:
        gguf.dequantize(theirs.data[(0,) * (theirs.data.ndim - 1)][None], theirs.tensor_type)
    except NotImplementedError:
        raise ValueError(f"{path} holds {name!r} of type {theirs.tensor_type.name}, which is not held here") from None


def _tokenizer_writer(path: Path, metadata: dict[str, Any], vocab_size: int) -> Callable[[Path], None]:
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    known = (*names.SPLITS, names.GPT2, names.SMOLLM)
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre_tokenizer not in known:
        kind = f"{metadata.get('tokenizer.ggml.model')!r} with pre-tokenizer {pre_tokenizer!r}"
        raise ValueError(f"{path} has a tokenizer of type {kind}; held are 'gpt2' with {', '.join(known)}")
    _check_tokenizer(path, metadata, vocab_size)

    def write(folder: Path) -> None:
        try:
            tokenizer = _tokenizer(metadata, pre_tokenizer)
        except Exception as error:  # tokenizers raises bare Exception for tokens and merges that do not fit
            raise ValueError(f"{path} has a tokenizer that cannot be built: {' '.join(str(error).split())}") from None
        tokenizer.save_pretrained(folder)

    return write


def _check_tokenizer(path: Path, metadata: dict[str, Any], vocab_size: int) -> None:
    """Raises ValueError where tokens, their types, merges or special ids are not what a tokenizer is made of."""
    kinds = {"tokens": str, "token_type": int, "merges": str}
    lists = {name: metadata.get(f"tokenizer.ggml.{name}") for name in kinds}
    for name, values in lists.items():
        if not isinstance(values, list) or not all(type(value) is kinds[name] for value in values):
            raise ValueError(f"{path} has no list of tokenizer.ggml.{name}")
    tokens, types, _ = (metadata[f"tokenizer.ggml.{name}"] for name in kinds)
    if not len(tokens) == len(types) <= vocab_size:
        raise ValueError(
            f"{path} has {len(tokens):,} tokens, {len(types):,} types of tokens and {vocab_size:,} embeddings"
        )
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path} has a tokenizer.chat_template that is no text")
    for kind in SPECIAL_IDS:
        value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise ValueError(
                f"{path} has tokenizer.ggml.{kind}_token_id={value!r}, which is none of its {len(tokens):,} tokens"
            )


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
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in SPECIAL_IDS}
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

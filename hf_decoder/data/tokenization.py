"""Trains tokenizers that the whole ecosystem loads without this package.

`train_tokenizer` returns a stock `PreTrainedTokenizerFast` of one of two types:

- `bpe`: byte-level BPE. Any text round-trips exactly: no normaliser, no unknown token, every byte is a token.
- `char`: one token per distinct character of the training text, for classic small experiments. A character that the
  training text lacks becomes `<|unk|>`.

The special tokens hold the first ids, which never move and are counted in the vocabulary size:

| id | token           | role                                                                |
|----|-----------------|---------------------------------------------------------------------|
| 0  | `<|endoftext|>` | `eos_token`, and the separator of documents; there is no bos token  |
| 1  | `<|pad|>`       | `pad_token`, distinct from eos so that eos keeps its loss           |
| 2  | `<|im_start|>`  | opens a chat turn                                                   |
| 3  | `<|im_end|>`    | closes a chat turn                                                  |
| 4  | `<|unk|>`       | `unk_token`, in the `char` type only                                |

`padding_side` is "left", because `generate` continues a row at its last column. Training works with either side:
padding has label -100 and attention mask 0.

`tokenizer(text)` and `apply_chat_template` read `<|im_end|>` in a text as the special token, as everywhere in
transformers. A service must refuse or rewrite it in what strangers send. Documents are encoded with
`split_special_tokens=True`, which reads it as plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
UNKNOWN = "<|unk|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)

TOKENIZER_TYPES = ("bpe", "char")
MIN_BPE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# The name under which llama.cpp knows the pre-tokenizer of the `bpe` type (GGUF key `tokenizer.ggml.pre`). Qwen2's is
# the one to share: its rule loses no character, digits stay single, and llama.cpp applies it without the NFC step
# that Qwen2's own tokenizer puts in front and that this one leaves out, since it would change the text.
LLAMA_CPP_PRE_TOKENIZER = "qwen2"

# Qwen2's rule in the spelling that llama.cpp compiles. Spelling the contractions out, instead of ignoring case, keeps
# the two equal on letters such as U+017F, which case folding would count as an s.
QWEN2_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")

# How transformers reads an answer of that template back into reasoning, text and calls (`parse_response`, `serve`).
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{IM_START}assistant\n",
    "fields": {
        "reasoning_content": {"open_pattern": r"<think>\n?", "close_pattern": r"\n?</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}

_DIGIT = re.compile("[0-9]")
_PIECE_CHARACTERS = 1 << 20
LONGEST_PIECE = 1 << 21


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 4096,
    tokenizer_type: str = "bpe",
    model_max_length: int | None = None,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`; the same texts in the same order give the same `tokenizer.json`, byte for byte.

    `vocab_size` includes the special tokens. It is an upper bound for `bpe`, because a short text runs out of pairs to
    merge. `char` ignores it. `model_max_length` is the number of tokens that `truncation=True` keeps.

    Raises ValueError for an unknown type, a vocabulary without room for the 256 bytes and the special tokens, texts
    that are empty, and texts that are not UTF-8 encodable.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"tokenizer_type {tokenizer_type!r} is unknown; choose one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type == "bpe" and vocab_size < MIN_BPE_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer; it needs at least {MIN_BPE_VOCAB_SIZE} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    if model_max_length is not None and model_max_length < 1:
        raise ValueError(f"model_max_length {model_max_length} must be at least 1 token, or None for no limit")
    pieces = _pieces([texts] if isinstance(texts, str) else texts)
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    if tokenizer_type == "bpe":
        return _wrap(_train_bpe(pieces, vocab_size, show_progress), **limit)
    return _wrap(_train_char(pieces), unk_token=UNKNOWN, **limit)


def train_word_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Trains a tokenizer with one token per whitespace-separated word, for classifiers of short texts.

    Words seen fewer than `min_frequency` times are `<|unk|>`. Decoding does not give the text back, because whitespace
    is lost. `vocab_size` is an upper bound and includes the special tokens.

    Raises ValueError for a vocabulary without room for a word, and texts that are empty or not UTF-8 encodable.
    """
    specials = (*SPECIAL_TOKENS, UNKNOWN)
    if vocab_size <= len(specials):
        raise ValueError(f"vocab_size {vocab_size} is too small for words: {len(specials)} special tokens come first")
    backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_special(specials),
        show_progress=False,
    )
    backend.train_from_iterator(_pieces(texts), trainer)
    return _wrap(backend, unk_token=UNKNOWN)


def _wrap(backend: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **settings,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises ValueError if `tokenizer` has ids that the embeddings of `config` lack."""
    needed, held = len(tokenizer), config.vocab_size
    if needed > held:
        raise ValueError(
            f"the tokenizer has {needed} tokens but the config's vocab_size is {held}; set vocab_size={needed} for a "
            f"new model, or call model.resize_token_embeddings({needed}) on a trained one"
        )


def digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a fast tokenizer's file, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def split_text(text: str, size: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts `text` into pieces of about `size` characters whose tokens together are the tokens of the whole text.

    Pieces save memory: a tokenizer holds some hundred bytes per token while it works. Cuts are at line starts or
    before a space; where there is neither, after a digit; after two million characters without any of these, right
    there, and only there tokens may differ. This is exact for the types of `train_tokenizer`. A tokenizer that marks
    the start of a text (SentencePiece's leading space) marks each piece.
    """
    start = 0
    while len(text) - start > size:
        stop = place_to_cut(text, start, size)
        if stop is None:
            break
        yield text[start:stop]
        start = stop
    yield text[start:]


def place_to_cut(text: str, start: int, size: int) -> int | None:
    """Where to cut the piece that begins at `start`, at least `size` characters later; None: nowhere."""
    first, last = start + size, min(start + max(size, LONGEST_PIECE), len(text))
    # No match of QWEN2_SPLIT crosses a line end followed by a non-space, or the start of a run of spaces. So a cut
    # there does not change tokens.
    places = []
    space = text.find(" ", first, last)
    while space >= 0 and text[space - 1].isspace():
        space = text.find(" ", space + 1, last)
    if space >= 0:
        places.append(space)
    line = text.find("\n", first - 1, last - 1) + 1
    while line and text[line].isspace():
        line = text.find("\n", line, last - 1) + 1
    if line:
        places.append(line)
    if places:
        return min(places)
    # After a digit is as safe for that rule, but not for rules that keep digits together.
    digit = _DIGIT.search(text, first - 1, last - 1)
    if digit is not None:
        return digit.end()
    return last if last < len(text) else None


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cuts the non-empty texts into pieces; ValueError if there are none, or one cannot be written as UTF-8."""
    empty = True
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {index} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "remove it, no UTF-8 text can hold one"
            ) from None
        if text:
            empty = False
            yield from split_text(text)
    if empty:
        raise ValueError("the training text for the tokenizer is empty; give it at least one character")


def _train_bpe(pieces: Iterator[str], vocab_size: int, show_progress: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # Adds no tokens. A token's offsets include its leading space.
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special(SPECIAL_TOKENS),
        # Sorted, because the order of the library's set changes from process to process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(pieces, trainer)
    return backend


def _train_char(pieces: Iterator[str]) -> Tokenizer:
    characters: set[str] = set()
    for piece in pieces:
        characters.update(piece)
    specials = (*SPECIAL_TOKENS, UNKNOWN)
    vocabulary = {token: index for index, token in enumerate((*specials, *sorted(characters)))}
    # A BPE without merges leaves single characters, and needs no pre-tokenizer.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(_special(specials))
    return backend


def _special(tokens: Iterable[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]

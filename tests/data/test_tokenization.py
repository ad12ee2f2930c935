"""The tokenizer: exact round trips, stock loading, ChatML, and what it refuses."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from hf_decoder.data.tokenization import (
    CHAT_TEMPLATE,
    LLAMA_CPP_PRE_TOKENIZER,
    MIN_BPE_VOCAB_SIZE,
    QWEN2_SPLIT,
    SPECIAL_TOKENS,
    check_tokenizer_fits,
    split_text,
    train_tokenizer,
    train_word_tokenizer,
)

TEXTS = [
    "def main(argv):\n    return [int(x) for x in argv]\n\n\nif __name__ == '__main__':\n    main()\n",
    "We'll say it's the lion's share, they'd agree: 1234 of 5678.\r\n\r\nNaïve café, 東京, Ελλάδα.\n",
] * 5
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello.\nYou?"},
    {"role": "user", "content": "Fine"},
    {"role": "assistant", "content": "Good"},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n"
    "<|im_start|>assistant\nHello.\nYou?<|im_end|>\n<|im_start|>user\nFine<|im_end|>\n"
    "<|im_start|>assistant\nGood<|im_end|>\n"
)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def char():
    return train_tokenizer(TEXTS, tokenizer_type="char")


def random_text(rng, alphabet=None):
    """Any Unicode text, or text over `alphabet`; surrogates are not text."""
    length = rng.randrange(60)
    if alphabet is not None:
        return "".join(rng.choice(alphabet) for _ in range(length))
    ranges = [
        (0, 0x20),
        (0x20, 0x7F),
        (0x7F, 0x250),
        (0x300, 0x370),
        (0x2000, 0x2070),
        (0x3000, 0x9FFF),
        (0xE000, 0x110000),
    ]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


SPLIT_ALPHABET = [
    *"aZé東'stmlld09٣ _.;!-(",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u0301",
    "\u200d",
    "😀",
    "\x1c",
    "\x85",
]


def test_bpe_round_trips_any_text(bpe):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(1500)] + [random_text(rng, SPLIT_ALPHABET) for _ in range(1500)]
    texts += [
        "",
        " ",
        "\n",
        "\x00",
        "\ufeffx",
        "e\u0301 is not \u00e9",
        "<|endoftext|>",
        "a<|im_start|> <|im_end|>b",
        "\U0010ffff",
    ]
    for split in (False, True):
        rows = bpe(texts, split_special_tokens=split)["input_ids"]
        assert bpe.batch_decode(rows) == texts
        assert max(max(row, default=0) for row in rows) < len(bpe)


def test_bpe_has_no_unknown_and_no_bos(bpe):
    assert bpe.unk_token is None and bpe.bos_token is None
    assert "".join(sorted(pre_tokenizers.ByteLevel.alphabet())) == "".join(
        sorted(t for t in bpe.get_vocab() if len(t) == 1)
    )


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_special_tokens_are_fixed(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    batch = tokenizer(["def main", "def"], padding=True)
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id and batch["attention_mask"][1][0] == 0
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "def"


def test_vocab_size_counts_special_tokens(bpe):
    assert len(bpe) == 300 == bpe.vocab_size
    assert len(train_tokenizer(["ab"], vocab_size=4096)) == MIN_BPE_VOCAB_SIZE + 1
    assert len(train_tokenizer("xyxy", MIN_BPE_VOCAB_SIZE)) == 260


def test_special_strings_in_documents_are_plain_text(bpe, char):
    text = "def main<|endoftext|>"
    for tokenizer in (bpe, char):
        assert 0 in tokenizer(text)["input_ids"]
    rows = bpe(text, split_special_tokens=True)["input_ids"]
    assert not set(rows) & {0, 1, 2, 3}
    assert bpe.decode(rows) == text


def test_char_has_one_token_per_character(char):
    characters = sorted(set("".join(TEXTS)))
    assert len(char) == 5 + len(characters)
    assert char.convert_ids_to_tokens(range(5, len(char))) == characters
    assert char.decode(char(TEXTS[1])["input_ids"]) == TEXTS[1]
    assert len(char(TEXTS[1])["input_ids"]) == len(TEXTS[1])
    assert char("dΩ\x00d")["input_ids"] == [5 + characters.index("d"), 4, 4, 5 + characters.index("d")]
    assert char.unk_token == "<|unk|>"


def test_pre_tokenizer_is_the_one_llama_cpp_knows():
    """transformers carries Qwen2's own pattern; ours must cut every text as it does."""
    assert LLAMA_CPP_PRE_TOKENIZER == "qwen2"
    ours = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    theirs = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    rng = random.Random(1)
    for _ in range(3000):
        text = random_text(rng, SPLIT_ALPHABET)
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_split_text_keeps_the_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(2)
    cut = 0
    for _ in range(600):
        text = random_text(rng, SPLIT_ALPHABET) + random_text(rng, SPLIT_ALPHABET)
        pieces = list(split_text(text, 7))
        cut += len(pieces) > 1
        assert "".join(pieces) == text
        ids = [index for piece in pieces for index in tokenizer(piece)["input_ids"]]
        assert ids == tokenizer(text)["input_ids"]
    assert cut > 300
    assert list(split_text("")) == [""]
    assert list(split_text("x" * 50, 10)) == ["x" * 50]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_data_without_spaces_or_lines_is_cut_behind_digits(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choice("abé0123+/'s") for _ in range(60))
        pieces = list(split_text(text, 7))
        assert "".join(pieces) == text and all(piece[-1].isdigit() for piece in pieces[:-1])
        ids = [index for piece in pieces for index in tokenizer(piece)["input_ids"]]
        assert ids == tokenizer(text)["input_ids"]


def test_a_text_without_any_place_to_cut_is_cut_all_the_same():
    pieces = list(split_text("x" * 5_000_000, 1000))
    assert [len(piece) for piece in pieces] == [1 << 21, 1 << 21, 5_000_000 - (1 << 22)]


def test_chat_template_is_chatml(bpe):
    assert bpe.apply_chat_template(MESSAGES, tokenize=False) == CHATML
    prompt = bpe.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert (
        prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
    )
    assert CHATML.startswith(prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert bpe.apply_chat_template(parts, tokenize=False) == "<|im_start|>user\nab<|im_end|>\n"
    assert bpe.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False).endswith(
        "nt\n<|im_end|>\n"
    )
    opened = bpe.apply_chat_template(MESSAGES[:3], tokenize=False, continue_final_message=True)
    assert opened.endswith("<|im_start|>assistant\nHello.\nYou?")


def test_assistant_mask_spans_what_the_model_says(bpe):
    out = bpe.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    said = [index for index, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert bpe.decode(said) == "Hello.\nYou?<|im_end|>Good<|im_end|>"
    assert said.count(3) == 2


SUBPROCESS_LOAD = """
import sys
sys.modules["hf_decoder"] = None
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def main(): <|im_end|> caf\\u00e9 \\u6771\\n"
    print(tokenizer(text)["input_ids"], tokenizer(text, split_special_tokens=True)["input_ids"], len(tokenizer),
          tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token, tokenizer.unk_token,
          tokenizer.padding_side, tokenizer.model_max_length, len(tokenizer.chat_template),
          tokenizer.decode(tokenizer("def main: e")["input_ids"]))
"""

SUBPROCESS_TRAIN = """
import hashlib, sys
from pathlib import Path
from hf_decoder.data.tokenization import train_tokenizer
from test_tokenization import TEXTS
for kind in ("bpe", "char"):
    train_tokenizer(TEXTS, 400, kind).save_pretrained(sys.argv[1])
    print(hashlib.sha256((Path(sys.argv[1]) / "tokenizer.json").read_bytes()).hexdigest())
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.process
def test_autotokenizer_loads_the_folder_without_our_package(tmp_path):
    expected = []
    for kind in ("bpe", "char"):
        tokenizer = train_tokenizer(TEXTS, 400, kind, model_max_length=77)
        tokenizer.save_pretrained(tmp_path / kind)
        text = "def main(): <|im_end|> café 東\n"
        values = (
            tokenizer(text)["input_ids"],
            tokenizer(text, split_special_tokens=True)["input_ids"],
            len(tokenizer),
            0,
            1,
            None,
            "<|unk|>" if kind == "char" else None,
            "left",
            77,
            len(CHAT_TEMPLATE),
            "def main: e",
        )
        expected.append(" ".join(map(str, values)))
        assert '"tokenizer_class": "TokenizersBackend"' in (tmp_path / kind / "tokenizer_config.json").read_text()
    assert run(SUBPROCESS_LOAD, tmp_path / "bpe", tmp_path / "char") == expected


@pytest.mark.process
def test_same_texts_give_the_same_file_in_another_process(tmp_path):
    expected = []
    for kind in ("bpe", "char"):
        train_tokenizer(iter(TEXTS), 400, kind).save_pretrained(tmp_path)
        expected.append(hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest())
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    assert run(SUBPROCESS_TRAIN, tmp_path, PYTHONPATH=os.pathsep.join(paths), PYTHONHASHSEED="7") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "empty"),
        ({"texts": ["", ""]}, "empty"),
        ({"texts": [""], "tokenizer_type": "char"}, "empty"),
        ({"texts": ["x"], "vocab_size": 259}, "vocab_size 259 is too small.* 260 "),
        ({"texts": ["x"], "tokenizer_type": "word"}, "'word' is unknown; choose one of bpe, char"),
        ({"texts": ["ok", "ab\ud800"]}, r"text 1 holds the lone surrogate U\+D800 at character 2"),
        ({"texts": ["x"], "model_max_length": 0}, "model_max_length 0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(**arguments)
    assert "\n" not in str(caught.value)


def test_tokenizer_must_fit_the_config(bpe):
    check_tokenizer_fits(bpe, LlamaConfig(vocab_size=300))
    check_tokenizer_fits(bpe, LlamaConfig(vocab_size=512))
    with pytest.raises(ValueError, match=r"300 tokens .* vocab_size is 299; .*resize_token_embeddings\(300\)"):
        check_tokenizer_fits(bpe, LlamaConfig(vocab_size=299))


def test_words_are_what_stands_between_blanks_the_frequent_ones(tmp_path):
    texts = ["the cat saw the dog , didn't it", "the dog\tsaw a bird,", "didn't  the cat <|im_end|>"]
    tokenizer = train_word_tokenizer(texts, 100)
    counts = Counter(word for text in texts for word in text.split())
    known = {word for word, count in counts.items() if count >= 2}
    assert set(tokenizer.get_vocab()) == known | {*SPECIAL_TOKENS, "<|unk|>"}
    for text in texts:
        expected = [word if word in known or word in SPECIAL_TOKENS else "<|unk|>" for word in text.split()]
        assert tokenizer.tokenize(text) == expected
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert (again.eos_token_id, again.pad_token_id, again.unk_token_id) == (0, 1, 4)
    # a limit keeps the most frequent, whatever the order of the process' sets
    assert [*set(train_word_tokenizer(texts, 6).get_vocab()) - {*SPECIAL_TOKENS, "<|unk|>"}] == ["the"]


def test_a_vocabulary_without_a_word_is_refused():
    with pytest.raises(ValueError, match="vocab_size 5 is too small"):
        train_word_tokenizer(TEXTS, 5)
    with pytest.raises(ValueError, match="empty"):
        train_word_tokenizer(["", ""], 100)

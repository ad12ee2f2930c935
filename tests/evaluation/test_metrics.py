"""The metrics against a plain loop over tokens, and against the compressor itself."""

import importlib.util
import math
import subprocess

import pytest
import sacrebleu
import torch
from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.evaluation.metrics import (
    Score,
    accuracy,
    bits_per_byte,
    bleu,
    chrf,
    corpus_score,
    exact_match,
    macro_f1,
    option_nats,
    perplexity,
    score,
    score_text,
    text_metric,
    xz_bits_per_byte,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_model(kind: str, **kwargs):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, **kwargs))
    return HfDecoderForCausalLM(HfDecoderConfig(**SHAPE, **kwargs))


def make_rows(count: int = 7, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Rows with unequal numbers of labels, one of them without any."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(0, 50, (length,), generator=generator)
        labels = ids.clone()
        labels[: 2 * i] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def plain_loop(model, rows) -> tuple[float, int]:
    """-ln p of every label, one token at a time, in fp64."""
    model = model.eval()
    nats, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0].double()
        for position in range(1, len(row["labels"])):
            label = int(row["labels"][position])
            if label != -100:
                nats -= float(torch.log_softmax(logits[position - 1], -1)[label])
                count += 1
    return nats, count


@pytest.mark.parametrize("kind", ["llama", "hf_decoder"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_score_is_the_sum_over_labels_whatever_the_batch(kind, batch_size):
    model, rows = make_model(kind), make_rows()
    nats, count = plain_loop(model, rows)
    result = score(model, rows, batch_size=batch_size)
    assert result.tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.loss == pytest.approx(nats / count, rel=1e-6)


def test_score_leaves_the_mode_of_the_model_and_ignores_dropout():
    model, rows = make_model("hf_decoder", attention_dropout=0.5).train(), make_rows()
    first, second = score(model, rows), score(model, rows)
    assert first == second
    assert model.training


def test_score_counts_likelihood_and_not_the_z_loss():
    rows = make_rows()
    plain, regularised = make_model("hf_decoder"), make_model("hf_decoder", z_loss_coef=0.5)
    assert score(regularised, rows).nats == pytest.approx(score(plain, rows).nats, rel=1e-6)


def test_score_of_packed_documents_is_that_of_the_documents_alone():
    model = make_model("hf_decoder")
    rows = make_rows(3)
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows]),
        "position_ids": torch.arange(12).repeat(3),
        "labels": torch.cat([torch.cat([torch.tensor([-100]), row["labels"][1:]]) for row in rows]),
    }
    together, apart = score(model, [packed]), score(model, rows)
    assert together.tokens == apart.tokens
    assert together.nats == pytest.approx(apart.nats, rel=1e-5)


def test_score_without_a_label_is_empty():
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, -100])}]
    result = score(make_model("llama"), rows)
    assert result == Score(0.0, 0)
    assert math.isnan(result.loss)


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    model = make_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = score(model, make_rows())
    assert perplexity(result.loss) == pytest.approx(50)
    # one byte a token
    assert bits_per_byte(result.nats, result.tokens) == pytest.approx(math.log2(50))


def test_perplexity_overflows_to_infinity():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf


def test_bits_per_byte_refuses_no_bytes():
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)


def test_xz_bits_per_byte_is_what_the_program_needs(tmp_path):
    texts = ["def f(x):\n    return x\n" * 40, "größer als " * 30]
    data = "".join(texts).encode()
    path = tmp_path / "text"
    path.write_bytes(data)
    try:
        packed = subprocess.run(
            ["xz", "-9e", "--check=crc64", "-c", str(path)], capture_output=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("no xz program here")
    assert xz_bits_per_byte(texts) == pytest.approx(8 * len(packed) / len(data))


def test_xz_bits_per_byte_refuses_no_text():
    with pytest.raises(ValueError, match="empty"):
        xz_bits_per_byte(["", ""])


TEXTS = ["def main(argv):\n    return 0 if argv else 1\n" * 3, "the end", "else return the argv\n" * 2]


def windows_by_hand(model, ids: list[int], block_size: int, stride: int) -> float:
    """Sum of -ln p over ids[1:], each token read from the first window that reaches it."""
    nats = 0.0
    for position in range(1, len(ids)):
        window = max(0, -(-(position - block_size + 1) // stride))
        start = window * stride
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:position]])).logits[0, -1].double()
        nats -= float(torch.log_softmax(logits, -1)[ids[position]])
    return nats


@pytest.mark.parametrize("kind", ["llama", "hf_decoder"])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_sliding_window_is_the_plain_loop(tokenizer, kind, stride):
    model = make_wide(kind)
    ids = [tokenizer.eos_token_id, *tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > 40
    found, report = score_text(model, tokenizer, documents(TEXTS[:1]), block_size=16, stride=stride)
    assert found.tokens == report.tokens == len(ids) - 1
    assert report.bytes == len(TEXTS[0].encode())
    assert found.nats == pytest.approx(windows_by_hand(model, ids, 16, stride), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "hf_decoder"])
def test_sliding_window_does_not_depend_on_the_batch_and_keeps_documents_apart(tokenizer, kind):
    model = make_wide(kind)
    scores = [
        score_text(model, tokenizer, documents(TEXTS), block_size=64, stride=63, batch_size=size)[0]
        for size in (1, 2, 64)
    ]
    alone = [score_text(model, tokenizer, documents([text]), block_size=64, stride=63)[0] for text in TEXTS]
    for result in scores:
        assert result.tokens == sum(one.tokens for one in alone)
        assert result.nats == pytest.approx(scores[0].nats, rel=1e-6)
    # texts that share blocks are cut elsewhere, which can only shorten the context
    assert scores[0].nats == pytest.approx(sum(one.nats for one in alone), rel=2e-2)


def test_a_model_without_position_ids_scores_each_document_alone(tokenizer):
    model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    together = score_text(model, tokenizer, documents(TEXTS), block_size=32)[0]
    alone = [score_text(model, tokenizer, documents([text]), block_size=32)[0] for text in TEXTS]
    assert together.nats == pytest.approx(sum(one.nats for one in alone), rel=1e-6)


def make_wide(kind: str):
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 300}
    model = (
        LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else HfDecoderForCausalLM(HfDecoderConfig(**shape))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that context matters
    return model.eval()


def documents(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def test_option_nats_are_those_of_a_plain_loop():
    model = make_model("hf_decoder").eval()
    prompts, options = [[3], [4, 5, 6, 7]], [[1], [2, 9, 8], [7, 7]]
    for batch_size in (1, 4):
        found = option_nats(model, prompts, options, batch_size=batch_size)
        for row, prompt in zip(found, prompts, strict=True):
            for nats, option in zip(row, options, strict=True):
                ids = prompt + option
                with torch.no_grad():
                    log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
                expected = -sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
                assert nats == pytest.approx(expected, rel=1e-5)


def test_bleu_and_chrf_by_their_definitions():
    # 9 of 10 words, 7 of 9 pairs, 5 of 8 triples, 3 of 7 quadruples; as long as the reference
    reference = "a b c d e f g h i j"
    prediction = "a b c d e x g h i j"
    expected = 100 * (9 / 10 * 7 / 9 * 5 / 8 * 3 / 7) ** 0.25
    assert bleu([prediction], [[reference]]) == pytest.approx(expected)
    # the second reference is matched instead
    assert bleu([prediction], [[reference, prediction]]) == pytest.approx(100)
    assert chrf([reference], [[reference]]) == pytest.approx(100)
    assert 0 < chrf([prediction], [[reference]]) < 100
    # cased, and references need not be equally many
    assert bleu(["A b c d e f", reference], [["a b c d e f"], ["z", reference]]) < 100


@pytest.mark.parametrize(
    "texts, tokenize",
    [
        (["我喜欢吃香蕉。", "今天天气很好我们去公园玩吧 OK。"], "zh"),
        (["我喜歡「カラオケ」這個地方因為那裡的音樂總是非常好聽而且朋友們每個週末都會一起去那裡唱歌聊天"], "zh"),
        (["the word 我 is one of Chinese"], "13a"),
        (["das ist größer als alles", "дом там близ реки"], "13a"),
        (["12 3 4 5 6 7."], "13a"),
    ],
)
def test_bleu_is_of_the_tokens_of_the_references_language(texts, tokenize):
    references = [[text, "x"] for text in texts]
    metric = text_metric("bleu", references)
    assert corpus_score(metric, texts, references) == pytest.approx(100)
    assert f"tok:{tokenize}|" in metric.get_signature().format()
    cut = [text[:-3] for text in texts]
    streams = [texts, ["x"] * len(texts)]
    assert bleu(cut, references) == sacrebleu.corpus_bleu(cut, streams, tokenize=tokenize).score
    assert bleu(cut, references, "char") == sacrebleu.corpus_bleu(cut, streams, tokenize="char").score


@pytest.mark.parametrize(
    "text, language, package", [("私はりんごが好きです", "ja", "ipadic"), ("나는 사과를 좋아한다", "ko", "mecab_ko")]
)
def test_a_tokenizer_that_is_not_installed_is_named(text, language, package):
    if importlib.util.find_spec(package) is not None:
        assert bleu([text], [[text]]) == pytest.approx(100)
        return
    with pytest.raises(ValueError, match=rf"sacrebleu\[{language}\].*--tokenize char"):
        bleu([text], [[text]])
    assert bleu([text], [[text]], "char") == pytest.approx(100)


def test_exact_match_accuracy_and_f1():
    assert exact_match(["yes ", "no", "no"], [["yes"], ["maybe", "no"], ["yes"]]) == pytest.approx(2 / 3)
    guesses, labels = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    assert accuracy(guesses, labels) == 0.5
    # a: TP 1, FP 1; b: TP 1, FN 2; c: FP 1
    assert macro_f1(guesses, labels) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


@pytest.mark.parametrize("measure", [bleu, chrf, exact_match, accuracy, macro_f1])
def test_measures_refuse_another_length(measure):
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        measure(["a", "b"], [["a"]])

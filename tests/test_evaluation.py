"""The measures against a plain loop over tokens, and against the compressor itself."""

import math
import subprocess

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.evaluation import Score, bits_per_byte, perplexity, score, xz_bits_per_byte

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

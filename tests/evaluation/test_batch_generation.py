"""What a model is given to complete: ids by the chat template, and the tokens that end an answer."""

import torch
from transformers import GenerationConfig

from hf_decoder.evaluation.batch_generation import complete_or_cut

CHAT = [{"role": "user", "content": "the end"}]
TEMPLATE = (
    "{% if loud %}if{% endif %}{{ messages[0].content }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
)


class Recorder:
    """A model that answers with its first end token, and keeps what it is called with."""

    device = "cpu"
    config = None

    def __init__(self, vocab_size: int):
        self.generation_config = GenerationConfig()
        self.embedding = torch.nn.Embedding(vocab_size, 1)
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, inputs, attention_mask, eos_token_id, **settings):
        rows = zip(inputs, attention_mask.bool(), strict=True)
        self.calls.append(([row[mask].tolist() for row, mask in rows], eos_token_id))
        return torch.nn.functional.pad(inputs, (0, 1), value=eos_token_id[0])


def test_a_text_ends_where_it_would_alone_whatever_stands_beside_it(tokenizer):
    seen = []
    for batch_size in (1, 8):
        model = Recorder(len(tokenizer))
        answers = list(complete_or_cut(model, tokenizer, ["if", CHAT, CHAT, "else", "def"], {}, batch_size))
        assert len(answers) == 5 and all(ended for _, ended in answers)
        seen.append([(row, ends) for rows, ends in model.calls for row in rows])
    assert seen[0] == seen[1]
    assert len({tuple(ends) for _, ends in seen[0]}) == 2


def test_the_template_is_given_what_stands_beside_a_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    model = Recorder(len(tokenizer))
    beside = [{}, {"chat_template_kwargs": {"loud": True}}, {"tools": [{"name": "def"}], "chat_template_kwargs": None}]
    list(complete_or_cut(model, tokenizer, [CHAT] * 3, {}, 8, beside))
    (rows, _) = model.calls[0]
    assert [tokenizer.decode(row) for row in rows] == ["the end", "ifthe end", "the enddef"]

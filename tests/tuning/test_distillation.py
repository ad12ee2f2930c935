"""The loss of a student against the plain KL divergence, and a student with a teacher against one without."""

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM

from hf_decoder.tuning import distillation
from hf_decoder.tuning.distillation import distillation_loss, head_of, hidden_states


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_value_and_gradient_are_those_of_the_plain_divergence(monkeypatch, alpha, cap):
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 5)  # the last one is cut short
    student = tiny_model(final_logit_softcapping=cap, tie_word_embeddings=True)
    teacher = tiny_model(seed=1, hidden_size=48, num_hidden_layers=3)
    ids = random_ids(2, 9)
    targets = torch.randint(3, 61, (18,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        taught = hidden_states(teacher, input_ids=ids).flatten(0, 1)
    hidden = hidden_states(student, input_ids=ids).flatten(0, 1)
    heads = head_of(student, ids), head_of(teacher, ids)
    found = distillation_loss(hidden, heads[0], taught, heads[1], targets, alpha)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    logits, wanted = (
        student(ids, use_cache=False).logits.double().flatten(0, 1),
        teacher(ids).logits.double().flatten(0, 1),
    )
    p, log_p, log_q = wanted.softmax(-1), wanted.log_softmax(-1), logits.log_softmax(-1)
    expected = alpha * (p * (log_p - log_q)).sum() + (1 - alpha) * functional.nll_loss(log_q, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_chunk_of_logits_is_held_and_not_all_of_them(monkeypatch):
    """What autograd keeps for the backward pass does not hold the vocabulary."""
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 8)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        head = lambda x: x @ weight.t()  # noqa: E731
        distillation_loss(hidden, head, hidden.detach(), head, torch.zeros(64, dtype=torch.long), 0.5)
    assert max(kept, default=0) <= hidden.numel()


def test_logits_of_another_family_are_known_by_comparison():
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**shape, **heads, logits_scaling=4.0, tie_word_embeddings=False)).eval()
    ids = random_ids(1, 5)
    found = head_of(granite, ids)(hidden_states(granite, input_ids=ids))
    torch.testing.assert_close(found, granite(ids).logits)
    forward = granite.forward
    granite.forward = lambda **inputs: forward(**inputs) | {"logits": forward(**inputs).logits + 1}
    with pytest.raises(
        ValueError, match="GraniteForCausalLM makes its logits in a way that distillation does not know"
    ):
        head_of(granite, ids)

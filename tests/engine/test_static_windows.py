"""Static caches of models with windows: the C++ step fills them as long as a text fits, then the modules go on."""

import pytest
import torch
from tiny_models import padded, tiny_model
from transformers import StaticCache

from hf_decoder.engine import settings
from hf_decoder.engine.cpp.build import find_compiler
from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

NEW_TOKENS = 20
KINDS = {
    "fits": {"sliding_window": 40},
    "fits, mixed": {"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]},
    "outgrown": {"sliding_window": 16},
    "outgrown, mixed": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "outgrown by the prompt": {"sliding_window": 4},
}
WAYS = {"greedy": {}, "scores": {"output_scores": True}, "sampled": {"do_sample": True}}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """One for each token of the C++ step."""
    calls: list[int] = []
    run = CppStep._run
    monkeypatch.setattr(CppStep, "_run", lambda self, chooses: calls.append(1) or run(self, chooses))
    return calls


def written(model, ids, mask, cache, **given):
    torch.manual_seed(0)
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    return model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **{CACHE_NAME: cache}, **fixed | given
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_caches_are_those_of_the_modules(kind, rows, way, steps):
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])
    ids, mask = padded(rows, 9)
    results = []
    for fast in (True, False):
        with settings.override(all=fast):
            cache = StaticCache(config=model.config, max_cache_len=64)
            first = written(model, ids, mask, cache, **WAYS[way])
            more = torch.cat((mask, torch.ones(rows, NEW_TOKENS, dtype=mask.dtype)), 1)
            second = written(model, first.sequences, more, cache, max_new_tokens=5)
            results.append((first.sequences, second.sequences, first.scores, cache))
        if fast:
            taken = len(steps)
    ours, theirs = results
    assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    if way == "scores":
        torch.testing.assert_close(torch.stack(ours[2]), torch.stack(theirs[2]), rtol=0, atol=1e-4)
    assert (taken == 0) == (kind == "outgrown by the prompt")
    if kind.startswith("fits"):
        assert taken >= NEW_TOKENS - 1 + 4
    for mine, other in zip(ours[3].layers, theirs[3].layers, strict=True):
        assert mine.get_seq_length() == other.get_seq_length() == 9 + NEW_TOKENS + 4
        filled = min(9 + NEW_TOKENS + 4, mine.keys.shape[2])
        seen = torch.ones(rows, filled) if filled < 33 else torch.cat((mask, torch.ones(rows, filled - 9)), 1)
        for name in ("keys", "values"):
            found, wanted = (getattr(of, name)[:, :, :filled] * seen[:, None, :, None] for of in (mine, other))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

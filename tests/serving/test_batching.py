"""Requests that wait for a model are written together, each as it would be alone."""

import copy
import gc
import threading
import time
import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_model
from transformers import GenerationConfig

pytest.importorskip("fastapi")

from transformers.cli.serving.utils import _GenerationCancelled

from hf_decoder.engine import settings as engine_settings
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME
from hf_decoder.serving import batching
from hf_decoder.serving.batching import BatchingManager, Job

PROMPTS = [[5, 6, 7], [9, 8], [11], [4, 3, 2, 1, 9, 8, 7], [12, 13]]


class Client:
    """One request, what came of it, and the token after which its client leaves."""

    def __init__(self, prompt, leaves_after=None, streams=True, **settings):
        self.came = threading.Event()
        self.prompt, self.leaves_after, self.tokens, self.result = prompt, leaves_after, [], None
        self.seed = settings.pop("seed", None)
        given = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
        self.config = GenerationConfig(**{**given, **settings})
        self.streams, self.is_prompt = streams, True

    def put(self, value):
        if self.is_prompt:
            self.is_prompt = False
            assert value.shape[0] == 1
            if self.leaves_after == 0:
                raise _GenerationCancelled
            return
        (token,) = value.tolist()
        self.tokens.append(token)
        if len(self.tokens) == self.leaves_after:
            raise _GenerationCancelled

    def done(self, result):
        assert self.result is None
        self.result = result
        self.came.set()

    def job(self, model, processor=None):
        inputs = {"input_ids": torch.tensor([self.prompt]), "attention_mask": torch.ones(1, len(self.prompt)).long()}
        streamer = self if self.streams else None
        return Job(model, processor, inputs, self.config, self.done, seed=self.seed, streamer=streamer)

    def alone(self, model):
        ids = torch.tensor([self.prompt])
        return model.generate(ids, generation_config=self.config)[0, len(self.prompt) :].tolist()


@pytest.fixture
def calls(monkeypatch):
    """The number of rows of each `generate`."""
    rows = []
    generate = batching.HfDecoderForCausalLM.generate

    def counted(self, input_ids, **kwargs):
        rows.append(len(input_ids))
        return generate(self, input_ids, **kwargs)

    monkeypatch.setattr(batching.HfDecoderForCausalLM, "generate", counted)
    return rows


def answered(model, clients, processor=None):
    """The clients after a manager that was busy when they came has answered them."""
    manager, gate = BatchingManager(), threading.Event()
    manager.submit(gate.wait)
    for client in clients:
        manager.write(client.job(model, processor))
    gate.set()
    assert all(client.came.wait(60) for client in clients)
    return clients


def test_those_who_wait_are_answered_together_as_they_would_be_alone(calls):
    model = tiny_model()
    lengths = [8, 3, 12, 1, 5]
    clients = [Client(p, max_new_tokens=n, streams=n != 5) for p, n in zip(PROMPTS, lengths, strict=True)]
    answered(model, clients)
    assert calls == [5, 2, 1]  # once half of them have ended, the others go on alone
    for client, length in zip(clients, lengths, strict=True):
        assert client.result.ids.tolist() == client.alone(model) and len(client.result.ids) == length
        assert client.tokens == (client.result.ids.tolist() if client.streams else [])
        assert not client.result.ended


def test_what_a_saved_model_says_keeps_nobody_alone(calls, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = batching.HfDecoderForCausalLM.from_pretrained(tmp_path)
    clients = [Client(prompt) for prompt in PROMPTS]
    for client in clients:
        client.config = copy.deepcopy(model.generation_config)
        client.config.update(max_new_tokens=3, pad_token_id=0)
    answered(model, clients)
    assert calls == [5]


def test_a_row_ends_by_itself_and_its_client_does_not_wait():
    model = tiny_model()
    text = Client(PROMPTS[0]).alone(model)
    ends = text[2]
    clients = [Client(prompt, max_new_tokens=9, eos_token_id=ends) for prompt in PROMPTS[:2]]
    written = []  # by the other one, when the first ends
    done = clients[0].done
    clients[0].done = lambda result: (written.append(len(clients[1].tokens)), done(result))
    answered(model, clients)
    first = clients[0].result
    assert first.ended and first.ids.tolist() == text[: text.index(ends) + 1]
    assert written[0] <= len(first.ids) < len(clients[1].result.ids)
    assert clients[1].result.ids.tolist() == clients[1].alone(model)


def test_a_client_who_leaves_stops_its_own_row_alone(calls):
    model = tiny_model()
    clients = [Client(PROMPTS[0], leaves_after=2, max_new_tokens=8), Client(PROMPTS[1])]
    answered(model, clients)
    assert calls == [2, 1] and len(clients[0].tokens) == 2
    assert clients[1].result.ids.tolist() == clients[1].alone(model)
    gone = [Client(prompt, leaves_after=0) for prompt in PROMPTS]
    computed = []
    handle = model.model.register_forward_hook(lambda *inputs: computed.append(1))
    answered(model, gone)
    handle.remove()
    assert not computed and not any(isinstance(client.result, Exception) or client.tokens for client in gone)
    alone = Client(PROMPTS[0], leaves_after=2, max_new_tokens=10**4)
    answered(tiny_model(max_position_embeddings=2 * 10**4), [alone])
    assert len(alone.tokens) == 2


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1, "do_sample": True}, {"repetition_penalty": 1.5}, {"num_beams": 2}, {"no_repeat_ngram_size": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_padding_or_neighbours_would_change_runs_alone(settings, calls):
    model = tiny_model()
    clients = [Client(p, streams="num_beams" not in settings, **settings) for p in PROMPTS[:3]]
    answered(model, clients)
    assert calls == [1, 1, 1]


def test_other_settings_wait_for_their_turn(calls):
    model, other = tiny_model(), tiny_model(sliding_window=4)
    ends = (model.generation_config.eos_token_id,)
    sampled = {"do_sample": True, "temperature": 0.5, "sequence_bias": {(3,): -5.0, ends: -100.0}}
    clients = [Client(PROMPTS[0]), Client(PROMPTS[1], **sampled), Client(PROMPTS[2]), Client(PROMPTS[3], **sampled)]
    answered(model, clients)
    assert calls == [2, 2]
    assert clients[2].result.ids.tolist() == clients[2].alone(model)
    calls.clear()
    dynamic = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    answered(dynamic, [Client(p) for p in PROMPTS])
    assert calls == [1] * 5
    calls.clear()
    clients = answered(other, [Client(p, max_new_tokens=12) for p in PROMPTS])
    assert calls == [5] and all(client.result.ids.tolist() == client.alone(other) for client in clients)


def test_a_batch_has_an_end(calls, monkeypatch):
    monkeypatch.setitem(batching.MAX_ROWS, "cpu", 3)
    model = tiny_model()
    answered(model, [Client(p) for p in PROMPTS])
    assert calls == [3, 2]
    calls.clear()
    monkeypatch.setattr(batching, "FREE_PADDING", 0)
    answered(model, [Client([3] * 30), *[Client([3]) for _ in range(2)]])
    assert calls == [1, 2, 3]  # the short ones join later: together their prompts would be padding for the most part
    calls.clear()
    room = model.config.max_position_embeddings // 2 - 1
    monkeypatch.setitem(batching.CACHE_BYTES, "cpu", 2 * (room + 1) * bytes_per_token(model))
    answered(model, [Client([token], max_new_tokens=room) for token in (3, 4, 5)])
    assert calls == [2, 1]


def bytes_per_token(model):
    cache = model(torch.tensor([[3]])).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def joining(model, clients, processor=None):
    """The clients; each comes while the one before it gets its second token."""
    manager = BatchingManager()
    for client, following in pairwise(clients):
        follow(client, partial(manager.write, following.job(model, processor)))
    manager.write(clients[0].job(model, processor))
    assert all(client.came.wait(60) for client in clients)
    return clients


def follow(client, write):
    put = client.put

    def putting(value):
        put(value)
        if len(client.tokens) == 2:
            write()

    client.put = putting


KINDS = {"full": {}, "windowed": {"sliding_window": 6}}
KINDS["half of the layers windowed"] = {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [True, False])
def test_who_comes_later_joins_and_is_answered_as_alone(kind, engine, calls):
    model = tiny_model(**KINDS[kind])
    lengths = [20, 4, 16, 3, 9, 12]
    prompts = [*PROMPTS, [7] * 25]  # the last one is longer than all that has been written before it
    clients = [Client(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
    with engine_settings.override(all=engine):
        joining(model, clients)
        assert max(calls) >= 3
        for client in clients:
            assert client.tokens == client.result.ids.tolist() == client.alone(model)


@pytest.mark.parametrize("joins", [True, False])
def test_a_text_is_read_once_if_its_cache_can_be_joined(joins, calls, monkeypatch):
    model = tiny_model()
    if not joins:
        monkeypatch.setattr(batching, "cache_of_rows", lambda *_: None)
    read = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, inputs, _: read.append(inputs[0].shape))
    clients = joining(model, [Client(p, max_new_tokens=9) for p in PROMPTS[:3]])
    handle.remove()
    long = [tuple(shape) for shape in read if shape[1] > 1]
    assert (long == [(1, 3), (1, 2)]) == joins  # the third prompt is one token
    assert 3 in calls and all(client.tokens == client.alone(model) for client in clients)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("layer")])
def test_nobody_waits_for_ever_if_caches_cannot_be_joined(error, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(batching, "cache_of_rows", fails)
    model = tiny_model()
    for client in joining(model, [Client(p, max_new_tokens=9) for p in PROMPTS[:2]]):
        if isinstance(error, RuntimeError):
            assert client.result.ids.tolist() == client.alone(model)  # the texts are read again
        else:
            assert client.result is error


def test_no_cache_outlives_its_batch(monkeypatch):
    model, caches = tiny_model(), []
    generate = batching.HfDecoderForCausalLM.generate

    def noted(self, *args, **kwargs):
        caches.append(weakref.ref(kwargs[CACHE_NAME]))
        assert sum(cache() is not None for cache in caches) <= 2
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(batching.HfDecoderForCausalLM, "generate", noted)
    gc.disable()
    try:
        clients = joining(model, [Client(p, max_new_tokens=9) for p in PROMPTS])
        end = time.monotonic() + 20
        while any(cache() is not None for cache in caches) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(caches) > len(clients) and not any(cache() for cache in caches)
    finally:
        gc.enable()


def test_nobody_overtakes_who_waits_for_another_batch(calls):
    model = tiny_model()
    order = []
    first, other, third = clients = [
        Client(PROMPTS[0], max_new_tokens=12),
        Client(PROMPTS[1], do_sample=True),
        Client(PROMPTS[2]),
    ]
    for client in clients:
        client.done = lambda result, client=client, done=client.done: (order.append(client), done(result))
    manager = BatchingManager()
    follow(first, lambda: [manager.write(client.job(model)) for client in (other, third)])
    manager.write(first.job(model))
    assert all(client.came.wait(60) for client in clients)
    assert order == [first, other, third] and calls == [1, 1, 1]


def test_who_joins_and_cannot_be_answered_is_no_trouble_for_those_who_run():
    model = tiny_model()
    sound, broken = joining(model, [Client(PROMPTS[0], max_new_tokens=9), Client([10**6])])
    assert isinstance(broken.result, Exception) and not broken.tokens
    assert sound.result.ids.tolist() == sound.alone(model)


def test_a_model_without_a_cache_is_batched_with_one(calls):
    model = tiny_model()
    clients = [Client(p, use_cache=False) for p in PROMPTS]
    assert all(client.result.ids.tolist() == client.alone(model) for client in joining(model, clients))
    assert max(calls) > 1


def test_an_error_reaches_all_of_a_batch_and_the_next_one_is_answered(calls):
    model = tiny_model()
    clients = answered(model, [Client([10**6]), Client(PROMPTS[0])])
    assert calls == [2] and all(isinstance(client.result, Exception) for client in clients)
    assert answered(model, [Client(PROMPTS[0])])[0].result.ids.tolist() == Client(PROMPTS[0]).alone(model)


@pytest.mark.parametrize("streams", [True, False])
def test_a_row_ends_with_a_stop_string_of_its_own_and_has_all_of_it(streams, tokenizer, calls):
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.3)
    prompts = [tokenizer(text)["input_ids"] for text in ("def main(", "import os", "class A:")]
    texts = [Client(prompt, max_new_tokens=12).alone(model) for prompt in prompts]
    words = [tokenizer.decode(token) for token in texts[0]]
    stop = next(word for word in words[3:] if word.isascii() and word.strip() and word not in "".join(words[:3]))
    clients = [Client(prompt, max_new_tokens=12, stop_strings=[stop], streams=streams) for prompt in prompts]
    expected = [
        model.generate(torch.tensor([c.prompt]), generation_config=c.config, tokenizer=tokenizer)[0, len(c.prompt) :]
        for c in clients
    ]
    calls.clear()
    answered(model, clients, tokenizer)
    assert calls == [3] and len(expected[0]) < 12
    for client, text in zip(clients, expected, strict=True):
        assert client.result.ids.equal(text) and client.result.ended == (len(text) < 12)
        assert client.tokens == (text.tolist() if streams else [])


def test_who_joins_ends_with_a_stop_string(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.3)
    prompts = [tokenizer(text)["input_ids"] for text in ("import os", "def main(", "class A:")]
    alone = [Client(prompt, max_new_tokens=12).alone(model) for prompt in prompts]
    words = [tokenizer.decode(token) for token in alone[1]]
    stop = next(word for word in words[3:] if word.isascii() and word.strip() and word not in "".join(words[:3]))
    clients = [Client(prompt, max_new_tokens=12, stop_strings=[stop]) for prompt in prompts]
    joining(model, clients, tokenizer)
    for client in clients:
        expected = model.generate(torch.tensor([client.prompt]), generation_config=client.config, tokenizer=tokenizer)
        assert client.tokens == client.result.ids.tolist() == expected[0, len(client.prompt) :].tolist()
    assert clients[1].result.ended and len(clients[1].tokens) < 12


@pytest.mark.parametrize("pad", [-1, 10**6, None])
def test_no_token_for_padding_is_needed(pad, calls):
    model = tiny_model()
    clients = answered(model, [Client(prompt, pad_token_id=pad) for prompt in PROMPTS])
    assert calls == [5]
    assert [client.result.ids.tolist() for client in clients] == [client.alone(model) for client in clients]


def test_what_the_model_says_of_each_text_holds_for_batches(calls):
    model = tiny_model()
    model.generation_config.repetition_penalty = 5.0
    answered(model, [Client(prompt) for prompt in PROMPTS[:2]])
    assert calls == [1, 1]
    model.generation_config.repetition_penalty = None
    model.generation_config.eos_token_id = Client(PROMPTS[0]).alone(model)[2]
    clients = answered(model, [Client(prompt, eos_token_id=None) for prompt in PROMPTS])
    assert clients[0].result.ended and len(clients[0].result.ids) < 8
    assert [client.result.ids.tolist() for client in clients] == [client.alone(model) for client in clients]


def test_a_client_that_cannot_be_answered_is_no_trouble_for_the_others(calls):
    model = tiny_model()
    broken, deaf, sound = clients = [Client(prompt) for prompt in PROMPTS[:3]]
    broken.put = lambda value: {}["parser"]
    done = deaf.done
    deaf.done = lambda result: (done(result), {}["loop"])
    answered(model, clients)
    assert calls == [3] and isinstance(broken.result, KeyError)
    assert sound.result.ids.tolist() == sound.alone(model)
    assert deaf.result.ids.tolist() == deaf.alone(model)


def test_rows_are_written_by_the_fast_step():
    model = tiny_model(attn_implementation="sdpa")
    with engine_settings.override(all=False):
        expected = [Client(p).alone(model) for p in PROMPTS]
    assert [client.result.ids.tolist() for client in answered(model, [Client(p) for p in PROMPTS])] == expected

"""Twins and plain classes, live models of either origin, switches, copies, and refusals."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import nn

import hf_decoder
from hf_decoder.engine import attach, detach, settings
from hf_decoder.engine.twins import REPLACED, code_files, is_twin, plain_of, twin_of
from hf_decoder.model import modeling_hf_decoder as plain

IDS = random_ids(2, 9)
FIXED = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HEADS = [name for name in REPLACED if name != "HfDecoderLayer"]


def text(model) -> torch.Tensor:
    return model.generate(IDS, **FIXED)


def kinds(model) -> set[bool]:
    """Whether the modules that can be twins are twins."""
    return {is_twin(type(module)) for module in model.modules() if type(module).__name__ in REPLACED}


@pytest.mark.parametrize("name", HEADS)
def test_public_classes_are_twins_all_the_way_down(name):
    model = tiny_model(getattr(hf_decoder, name))
    assert kinds(model) == {True}
    assert type(model) is twin_of(getattr(plain, name)) and plain_of(type(model)) is getattr(plain, name)
    assert (type(model).__name__, type(model).__module__) == (name, plain.__name__)
    assert isinstance(model, getattr(plain, name)) and isinstance(model, hf_decoder.HfDecoderPreTrainedModel)


def test_detached_and_attached_again():
    model = tiny_model(attn_implementation="sdpa")
    expected, parameters = text(model), dict(model.named_parameters())
    assert detach(model) is model and kinds(model) == {False}
    assert type(model) is plain.HfDecoderForCausalLM
    assert torch.equal(text(model), expected)
    assert attach(model) is model and kinds(model) == {True}
    attach(model)  # twice is once
    assert torch.equal(text(model), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.kernels
def test_a_plain_model_reads_no_further_than_its_own_room():
    """The plain classes run where the engine cannot be imported."""
    folder = Path(plain.__file__).parent
    program = f"""
import sys
sys.modules["hf_decoder"] = type(sys)("hf_decoder")
sys.modules["hf_decoder"].__path__ = []
import importlib.util
spec = importlib.util.spec_from_file_location("room", {str(folder / "__init__.py")!r},
                                              submodule_search_locations=[{str(folder)!r}])
room = importlib.util.module_from_spec(spec); sys.modules["room"] = room; spec.loader.exec_module(room)
from room.modeling_hf_decoder import HfDecoderForCausalLM
from room.configuration_hf_decoder import HfDecoderConfig
import torch
model = HfDecoderForCausalLM(HfDecoderConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1,
                                             num_attention_heads=2, num_key_value_heads=1))
ids = torch.arange(9)[None]
model(ids, labels=ids).loss.backward()
print(model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.stdout.strip() == "12", run.stderr


@pytest.mark.parametrize("of", ["part", "all"])
def test_settings_switch_parts_off(of, layers):
    model = tiny_model(attn_implementation="sdpa")
    expected = text(model)
    seen = len(layers)
    with settings.override(**({"decoding": False} if of == "part" else {"all": False})):
        assert torch.equal(text(model), expected)
    assert len(layers) >= seen + 2 * 6  # each layer was called for each token
    assert settings.decoding and settings.training
    with pytest.raises(TypeError), settings.override(turbo=False):
        pass


def test_the_environment_switches_all_of_it_off():
    program = "from hf_decoder.engine import settings; import json; print(json.dumps(vars(settings)))"
    for value, expected in (("0", {False}), ("1", {True})):
        run = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "HF_DECODER_ENGINE": value},
        )
        switches = [value for value in json.loads(run.stdout).values() if isinstance(value, bool)]
        assert set(switches) == expected, run.stderr


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("attached", [True, False])
def test_copies_are_of_the_same_kind(name, attached):
    model = tiny_model(getattr(hf_decoder, name))
    if not attached:
        detach(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(model) and kinds(other) == {attached}
        assert pickle.loads(pickle.dumps(type(model))) is type(model)  # as `spawn` sends classes
        with torch.no_grad():
            ours, theirs = model(IDS[:1]).to_tuple()[0], other(IDS[:1]).to_tuple()[0]
        assert torch.equal(ours, theirs)


class Mine(hf_decoder.HfDecoderForCausalLM):
    """A user's class over a fast one."""


def test_a_class_of_somebody_s_own_is_pickled_by_its_name():
    model = tiny_model(Mine)
    other = pickle.loads(pickle.dumps(model))
    assert pickle.loads(pickle.dumps(Mine)) is Mine is type(other)
    with torch.no_grad():
        assert torch.equal(model(IDS[:1]).logits, other(IDS[:1]).logits)


def test_hidden_states_and_attentions_are_recorded():
    for attention in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=attention)
        slow = detach(copy.deepcopy(model))
        wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        with torch.no_grad():
            mine, theirs = model(IDS, **wanted), slow(IDS, **wanted)
        assert len(mine.hidden_states) == 3
        for a, b in zip(
            mine.hidden_states + (mine.attentions or ()), theirs.hidden_states + (theirs.attentions or ()), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_weights_replaced_between_two_calls_are_the_ones_that_are_used():
    model, other = tiny_model(attn_implementation="sdpa"), tiny_model(attn_implementation="sdpa", seed=3)
    for cache in (None, "static"):
        before = model.generate(IDS, cache_implementation=cache, **FIXED)
        model.load_state_dict(other.state_dict())
        assert torch.equal(
            model.generate(IDS, cache_implementation=cache, **FIXED),
            other.generate(IDS, cache_implementation=cache, **FIXED),
        )
        model.load_state_dict(tiny_model(attn_implementation="sdpa").state_dict())
        assert torch.equal(model.generate(IDS, cache_implementation=cache, **FIXED), before)


def test_half_precision_and_resized_embeddings():
    model = tiny_model(attn_implementation="sdpa")
    model.resize_token_embeddings(70)
    slow = detach(copy.deepcopy(model))
    assert torch.equal(text(model), text(slow))
    model.bfloat16(), slow.bfloat16()
    torch.testing.assert_close(model(IDS).logits, slow(IDS).logits, rtol=0.05, atol=0.05)


def test_what_cannot_be_attached_is_refused_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="Linear is no model of this package"):
        attach(nn.Linear(2, 2))
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(detach(tiny_model()), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="before get_peft_model"):
            attach(model)


def test_an_adapter_over_an_attached_model():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_model(attn_implementation="sdpa"), peft.LoraConfig(init_lora_weights=False)
    ).eval()
    expected = detach(copy.deepcopy(model.base_model.model))
    assert torch.equal(text(model), text(expected))


REMOTE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
ids = torch.tensor(json.loads(sys.argv[2]))
fixed = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
plain = model.generate(ids, **fixed)
from hf_decoder.engine import attach, detach
from hf_decoder.engine.twins import REPLACED, is_twin
try:
    attach(model)
except ValueError as error:
    print(json.dumps({"refused": str(error)}))
    raise SystemExit
assert all(is_twin(type(m)) for m in model.modules() if type(m).__name__ in REPLACED)
assert type(model).__module__.startswith("transformers_modules.")
assert torch.equal(model.generate(ids, **fixed), plain)
assert torch.equal(model.generate(ids, cache_implementation="static", **fixed), plain)
import copy, pickle
assert torch.equal(pickle.loads(pickle.dumps(model)).generate(ids, **fixed), plain)
model.save_pretrained(sys.argv[3])
detach(model)
assert torch.equal(model.generate(ids, **fixed), plain)
model.save_pretrained(sys.argv[3] + "-detached")
import hf_decoder
again = AutoModelForCausalLM.from_pretrained(sys.argv[3])
assert type(again) is hf_decoder.HfDecoderForCausalLM
print(json.dumps({"text": again.generate(ids, **fixed).tolist()}))
"""


@pytest.mark.kernels
@pytest.mark.parametrize("version", ["same", "other"])
def test_a_model_of_remote_code(version, run_python, tmp_path):
    """`import hf_decoder` comes after the model here, so that the checkpoint's own code was loaded."""
    model = tiny_model(attn_implementation="sdpa")
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").glob("*.py")} == {file.name for file in code_files()}
    if version == "other":
        file = tmp_path / "saved/modeling_hf_decoder.py"
        file.write_text(file.read_text() + "\n# changed\n")
    output = run_python(REMOTE, tmp_path / "saved", json.dumps(IDS.tolist()), tmp_path / "again")
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    if version == "other":
        assert "another version" in found["refused"]
        return
    assert found["text"] == text(model).tolist()
    for folder in ("again", "again-detached"):
        assert {file.name for file in (tmp_path / folder).glob("*.py")} == {file.name for file in code_files()}


def test_saving_over_an_older_folder_leaves_no_file_of_its_code(tmp_path):
    (tmp_path / "triton_hf_decoder.py").write_text("# of an older version\n")
    (tmp_path / "mine.py").write_text("# of somebody's\n")
    tiny_model().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {"mine.py", *(file.name for file in code_files())}

"""Weights worse than chance, dead or exploded ones, and settings and templates of which no chat ends."""

import json

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from patients import copy, edit_json, edit_weights, examine, of

from hf_decoder.cli.main import main

QUALITY_ROWS = ("values", "stop_ids", "chat_roles", "chat_tokens")


def exchange(one, other):
    """Each tensor with `one` in its name and the same with `other` change places."""

    def change(tensors):
        for name in [name for name in tensors if one in name]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return change


def norms_minus_one(tensors):
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name] - 1


def shifted_vocabulary(tensors):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].roll(1, 0)


MISPLACED = {
    "keys and values exchanged": exchange("k_proj", "v_proj"),
    "layers exchanged": exchange("layers.0.", "layers.3."),
    "norms stored minus one": norms_minus_one,
    "vocabulary shifted by one": shifted_vocabulary,
}


@pytest.mark.process
def test_what_was_learnt_is_better_than_chance(trained):
    row = examine(trained, ("likelihood",), text_file=trained.parent / "text.txt")["likelihood"]
    assert row.status == "pass" and "nats a token on the text given" in row.detail


def state(folder, dataset, loss):
    """Writes a held-out loss into the card, as pretrain does."""
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = "a-model"
    card.data.eval_results = [
        EvalResult("text-generation", "text", f"{dataset}, held-out part", "loss", loss, metric_name="Loss")
    ]
    card.save(folder / "README.md")


@pytest.mark.process
@pytest.mark.parametrize("name", MISPLACED)
def test_weights_in_the_wrong_place_are_worse_than_chance(name, trained, tmp_path):
    folder = copy(trained, tmp_path / "model")
    edit_weights(folder, MISPLACED[name])
    rows = ("load", "loss", "generate", "rope", "tied", "values", "likelihood")
    assert set(of("fail", examine(folder, rows, text_file=trained.parent / "text.txt"))) == {"likelihood"}


@pytest.mark.process
@pytest.mark.parametrize("name", ["keys and values exchanged", "layers 0 and 1 exchanged"])
def test_what_is_far_from_the_card_is_warned_of(name, trained, tmp_path):
    """A small model survives some mistakes, and is then better than chance still."""
    folder = copy(trained, tmp_path / "model")
    state(folder, "text.txt", 2.5)
    text = trained.parent / "text.txt"
    assert examine(folder, ("likelihood",), text_file=text)["likelihood"].status == "pass"
    edit_weights(folder, {**MISPLACED, "layers 0 and 1 exchanged": exchange("layers.0.", "layers.1.")}[name])
    assert examine(folder, ("likelihood",), text_file=text)["likelihood"].status in ("warn", "fail")


def test_the_command_takes_the_text(trained, tmp_path, capsys):
    flags = ["--rows", "likelihood", "--text_file"]
    assert main(["doctor", str(trained), *flags, str(trained.parent / "text.txt")]) == 0
    assert "text given" in capsys.readouterr().out
    assert main(["doctor", str(trained), *flags, str(tmp_path / "gone.txt")]) == 2
    assert "gone.txt does not exist" in capsys.readouterr().err


@pytest.mark.process
def test_without_text_the_card_says_what_to_expect(trained, tmp_path):
    folder = copy(trained, tmp_path / "model")
    row = examine(folder, ("likelihood",))["likelihood"]
    assert row.status == "skip" and "--text_file" in row.detail
    for dataset, status in (("the standard library of Python 3.11", "fail"), ("text.txt", "warn")):
        state(folder, dataset, 3.5)
        row = examine(folder, ("likelihood",))["likelihood"]
        assert row.status == "pass", row
        broken = copy(folder, tmp_path / status)
        edit_weights(broken, shifted_vocabulary)
        assert examine(broken, ("likelihood",))["likelihood"].status == status


def zero_matrix(folder):
    edit_weights(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].zero_())


def huge_row(folder):
    edit_weights(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].fill_(1e30))


def suppress_beyond(folder):
    edit_json(folder / "generation_config.json", suppress_tokens=[5, 100_000])


def bad_words_beyond(folder):
    edit_json(folder / "generation_config.json", bad_words_ids=[[5], [6, 100_000]])


def ordinary_end(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[0, 3, 40])


def open_end(folder):
    edit_json(folder / "generation_config.json", eos_token_id=0)


OTHER_TURN = "{{- text_of(message['content']) + '<|im_end|>' -}}"


def template(change):
    def write(folder):
        path = folder / "chat_template.jinja"
        text = change(path.read_text())
        assert text != path.read_text()
        path.write_text(text)

    return write


def alike(folder):
    def change(tensors):
        rows = tensors["model.embed_tokens.weight"]
        rows[2:4] = rows[2] + 0.05 * torch.randn(2, rows.shape[1], generator=torch.Generator().manual_seed(0))

    edit_weights(folder, change)


SYSTEM_AWAY = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') -%}"
DAMAGES = [
    (zero_matrix, "values", "up_proj.weight is all zeros"),
    (huge_row, "values", "row 3 of model.layers.0.mlp.up_proj.weight holds 1.0e+30"),
    (suppress_beyond, "stop_ids", "suppress_tokens holds 100000"),
    (bad_words_beyond, "stop_ids", "bad_words_ids holds 100000"),
    (ordinary_end, "stop_ids", "ordinary token"),
    (open_end, "chat_roles", "no token of it ends generation"),
    (template(lambda t: SYSTEM_AWAY + t), "chat_roles", "leaves the system turn out"),
    (template(lambda t: t.replace("message['role'] + ", "'someone' + ")), "chat_roles", "look the same"),
    (template(lambda t: t.replace("'<|im_end|>'", "''")), "chat_roles", "leaves out the token that closes"),
    (
        template(
            lambda t: (
                t.replace("{%- generation -%}", "")
                .replace("{%- endgeneration -%}", "")
                .replace(OTHER_TURN, "{%- generation -%}" + OTHER_TURN + "{%- endgeneration -%}")
            )
        ),
        "chat_roles",
        "not the answer",
    ),
    (alike, "chat_tokens", "never trained"),
]


@pytest.mark.parametrize(("damage", "warned", "words"), DAMAGES)
def test_damage_is_warned_of_by_its_row_alone(damage, warned, words, llama):
    assert of("warn", examine(llama, QUALITY_ROWS)) == {}
    damage(llama)
    rows = examine(llama, QUALITY_ROWS)
    assert of("fail", rows) == {}
    found = of("warn", rows)
    assert set(found) == {warned} and words in found[warned]
    assert rows[warned].remedy


def test_a_base_model_of_pretrain_need_not_know_chats(llama):
    """Its template comes with the tokenizer; the rows say what a tuning has to train."""
    open_end(llama)
    alike(llama)
    (llama / "all_results.json").write_text(json.dumps({"train_tokens": 1000, "eval_loss": 3.0}))
    rows = examine(llama, QUALITY_ROWS)
    assert {row.status for row in rows.values()} == {"pass"}
    assert "base model" in rows["chat_roles"].detail and "LoRA" in rows["chat_tokens"].detail


def test_a_template_without_a_system_turn_says_so(llama):
    path = llama / "chat_template.jinja"
    refuse = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system here') }}{%- endif -%}"
    path.write_text(refuse + path.read_text())
    row = examine(llama, ("chat_roles",))["chat_roles"]
    assert row.status == "pass" and "no system turn (no system here)" in row.detail

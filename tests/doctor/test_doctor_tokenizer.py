"""Tokenizers that change the text, and special ids of which three files say different things."""

import json

import pytest
from patients import edit_json, examine, of

TOKENIZER_ROWS = ("tokenizer", "pad", "special_ids", "chat_template", "generation_config")


def edit_tokenizer(folder, **changes):
    edit_json(folder / "tokenizer.json", **changes)


def lower_case(folder):
    edit_tokenizer(folder, normalizer={"type": "Lowercase"})


def cut_short(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def no_tokenizer(folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()


def too_large(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    last = dict(values["added_tokens"][-1], id=5000, content="<|beyond|>")
    edit_tokenizer(folder, added_tokens=[*values["added_tokens"], last])


def pad_is_eos(folder):
    edit_json(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, pad_token_id=0)


def other_eos(folder):
    edit_json(folder / "generation_config.json", eos_token_id=5)


def other_pad(folder):
    edit_json(folder / "config.json", pad_token_id=7)


def eos_outside(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[0, 100_000])


def no_eos(folder):
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, eos_token_id=None)


def template(text):
    def write(folder):
        (folder / "chat_template.jinja").write_text(text)

    return write


def sampling_without_sampling(folder):
    edit_json(folder / "generation_config.json", do_sample=False, temperature=0.5, top_p=0.9)


def impossible_setting(folder):
    edit_json(folder / "generation_config.json", num_beams=0)


SAY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DAMAGES = [
    (lower_case, {"tokenizer"}, "comes back as 'the quick"),
    (cut_short, {"tokenizer"}, "cannot be loaded"),
    (no_tokenizer, {"tokenizer"}, "holds no tokenizer"),
    (too_large, {"tokenizer"}, "the model embeds"),
    (pad_is_eos, {"pad"}, "pad and eos are the same token"),
    (other_eos, {"special_ids"}, "eos_token_id is 0 in config.json and 5 in generation_config.json"),
    (other_pad, {"special_ids"}, "pad_token_id is 7 in config.json"),
    (eos_outside, {"special_ids"}, "outside the vocabulary"),
    (no_eos, {"special_ids"}, "generate() does not know it"),
    (template("{{ raise_exception('no chats today') }}"), {"chat_template"}, "no chats today"),
    (template("{{ nothing.at.all }}"), {"chat_template"}, "undefined"),
    (
        template("{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"),
        {"chat_template"},
        "leaves a message out",
    ),
    (template(SAY.replace("messages", "messages | reverse")), {"chat_template"}, "order"),
    (sampling_without_sampling, {"generation_config"}, "temperature"),
    (impossible_setting, {"generation_config"}, "fails with the checkpoint's own settings"),
]


@pytest.mark.parametrize(("damage", "failing", "words"), DAMAGES)
def test_damage_is_caught_by_its_row_alone(damage, failing, words, llama):
    damage(llama)
    found = of("fail", examine(llama, TOKENIZER_ROWS))
    assert set(found) == failing
    assert any(words in detail for detail in found.values()), found


def test_what_is_only_warned_of_or_skipped(llama):
    template(SAY)(llama)
    rows = examine(llama, TOKENIZER_ROWS)
    assert set(of("warn", rows)) == {"chat_template"} and "adds nothing" in rows["chat_template"].detail
    (llama / "chat_template.jinja").unlink()
    assert "base model" in examine(llama, TOKENIZER_ROWS)["chat_template"].detail
    edit_json(llama / "tokenizer_config.json", pad_token=None)
    assert set(of("warn", examine(llama, TOKENIZER_ROWS))) == {"pad"}


def test_characters_that_a_tokenizer_lacks_are_no_fault_of_its_files(llama):
    """Ours of the `char` type has one token for all that its training text lacks."""
    from hf_decoder.data.tokenization import train_tokenizer

    train_tokenizer(["The quick brown fox"], tokenizer_type="char").save_pretrained(llama)
    row = examine(llama, ("tokenizer",))["tokenizer"]
    assert row.status == "warn" and "without a token" in row.detail


def test_several_ends_of_text_are_one_if_they_meet(llama):
    edit_json(llama / "generation_config.json", eos_token_id=[3, 0])
    rows = examine(llama, TOKENIZER_ROWS)
    assert of("fail", rows) == {} and "0, 3" in rows["special_ids"].detail

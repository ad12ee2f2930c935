"""What lies in a checkpoint's folder: other formats, code, damaged weights, a card that is not one."""

import json
import pickle

import pytest
import torch
from patients import CARD, edit_json, edit_weights, examine, of

FILE_ROWS = ("formats", "code", "weights", "card", "load", "tied")


def add_training_args(folder):
    torch.save({"learning_rate": 1.0}, folder / "training_args.bin")


def add_pickle_of_another_name(folder):
    (folder / "notes.dat").write_bytes(pickle.dumps({"a": 1}))


def only_pickled_weights(folder):
    (folder / "pytorch_model.bin").write_bytes(b"x")


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def not_a_number(folder):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    edit_weights(folder, spoil)


def lose_a_shard(folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_surplus_weights(folder):
    (folder / "model-old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def lose_a_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def add_a_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}))


def reshape_a_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def kernel_of_the_hub(folder):
    edit_json(folder / "config.json", _attn_implementation="somebody/kernel")


def code_of_another_repository(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "somebody/else--modeling_llama.Llama"})


def code_that_is_absent(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def own_generate(folder):
    edit_json(folder / "generation_config.json", custom_generate="somebody/decoding")


def own_generate_file(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("")


def no_card(folder):
    (folder / "README.md").unlink()


def card_with(text):
    def write(folder):
        (folder / "README.md").write_text(text)

    return write


# damage -> rows that fail, words of the first of them
DAMAGES = [
    (add_training_args, {"formats"}, "training_args.bin"),
    (add_pickle_of_another_name, {"formats"}, "notes.dat"),
    (only_pickled_weights, {"formats"}, "pytorch_model.bin"),
    (truncate, {"weights", "load"}, "damaged or cut short"),
    (not_a_number, {"weights", "load"}, "model.norm.weight holds values that are not finite"),
    (lose_a_shard, {"weights"}, "shard model-00002-of-00002.safetensors"),
    (add_surplus_weights, {"weights"}, "nothing refers to: model-old.safetensors"),
    (lose_a_tensor, {"load"}, "lacks model.layers.1.mlp.up_proj.weight"),
    (add_a_tensor, {"load"}, "no place for"),
    (reshape_a_tensor, {"load"}, "model.norm.weight"),
    (kernel_of_the_hub, {"code"}, "somebody/kernel"),
    (code_of_another_repository, {"code"}, "another repository: somebody/else--modeling_llama.Llama"),
    (code_that_is_absent, {"code"}, "that file is absent"),
    (own_generate, {"code"}, "somebody/decoding"),
    (own_generate_file, {"code"}, "custom_generate/generate.py"),
    (no_card, {"card"}, "no README.md"),
    (card_with(CARD.replace("license: apache-2.0", "license: [")), {"card"}, "cannot be read"),
    (card_with(CARD.replace("library_name: transformers\n", "")), {"card"}, "lacks library_name"),
    (card_with(CARD + "\n[More Information Needed]\n"), {"card"}, "placeholder"),
    (card_with(CARD.replace("pipeline(", "something(")), {"card"}, "how to load"),
    (card_with(CARD + "\n![curve](loss_curve.png)\n"), {"card"}, "loss_curve.png"),
]


@pytest.mark.parametrize(("damage", "failing", "words"), DAMAGES)
def test_damage_is_caught_by_its_row_alone(damage, failing, words, llama):
    damage(llama)
    rows = examine(llama, FILE_ROWS)
    found = of("fail", rows)
    assert set(found) == failing
    assert any(words in detail for detail in found.values()), found


def test_a_card_without_a_licence_is_warned_of(llama):
    card_with(CARD.replace("license: apache-2.0\n", ""))(llama)
    assert of("warn", examine(llama, ("card",))).keys() == {"card"}


def test_pickles_of_training_are_to_be_deleted_and_those_of_weights_to_be_converted(llama):
    add_training_args(llama)
    assert "delete training_args.bin" in examine(llama, ("formats",))["formats"].remedy
    only_pickled_weights(llama)
    assert "save_pretrained" in examine(llama, ("formats",))["formats"].remedy


def test_what_pretraining_saves_holds_no_pickle(healthy, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from hf_decoder.training.checkpoint_formats import save_in_full

    args = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(healthy["ours"]), args)
    save_in_full(trainer, tmp_path / "plain")
    assert of("fail", examine(tmp_path / "plain", ("formats", "code", "weights", "load"))) == {}
    trainer.save_model(tmp_path / "with arguments")
    assert set(of("fail", examine(tmp_path / "with arguments", ("formats",)))) == {"formats"}


SAVED_TWICE = [(1.0, "saved again"), (2.0, "differs from")]


@pytest.mark.parametrize(("factor", "words"), SAVED_TWICE)
def test_a_tied_head_that_is_saved_too(factor, words, ours):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    edit_weights(ours, add)
    found = of("fail", examine(ours, FILE_ROWS))
    assert set(found) == {"tied"} and words in found["tied"]


def test_a_damaged_config(llama):
    (llama / "config.json").write_text("{")
    rows = examine(llama, (*FILE_ROWS, "padding", "generate"))
    assert set(of("fail", rows)) == {"load"}
    assert {"padding", "generate", "tied"} <= set(of("skip", rows))
    assert "damaged" in rows["load"].detail


def test_ours_without_its_code(ours):
    for file in ours.glob("*.py"):
        file.unlink()
    edit_json(ours / "config.json", auto_map=...)
    rows = examine(ours, (*FILE_ROWS, "remote_code"))
    assert set(of("fail", rows)) == {"remote_code"} and set(of("warn", rows)) == {"code"}

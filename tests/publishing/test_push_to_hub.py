"""What transformers and PEFT push themselves, and an adapter of ours: loaded by name without the package."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_decoder.cli.main import main

pytestmark = pytest.mark.process

IDS = [[7, 21, 3, 40, 5, 77, 12]]

# One process, as a user's: what it is told before it imports anything is the address of the Hub and a token.
PUSHES = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
import hf_decoder

folder, out = sys.argv[1:3]
ids = torch.tensor({ids})
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
said = {{"owner/pushed": model.eval()(ids).logits}}
model.push_to_hub("owner/pushed", private=True)
tokenizer.push_to_hub("owner/pushed")

rows = [{{"input_ids": ids[0], "labels": ids[0]}}] * 4
args = TrainingArguments(
    out + "/trained", max_steps=2, save_steps=1, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
    push_to_hub=True, hub_model_id="owner/trained", hub_strategy="end",
)
trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub(dataset="made-up rows")
said["owner/trained"] = model.eval()(ids).logits

base = AutoModelForCausalLM.from_pretrained("owner/pushed")
tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
tuned.push_to_hub("owner/adapter")
said["owner/adapter"] = tuned(ids).logits
torch.save({{name: value.detach() for name, value in said.items()}}, out + "/said.pt")
"""

# Another one, where the package cannot be imported: every model by its name, the card's lines as they stand.
LOADS = """
import re, sys
import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

expected = torch.load(sys.argv[1])
ids = torch.tensor({ids})
for name in ("owner/pushed", "owner/trained"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(ids).logits, expected[name]), name
base = AutoModelForCausalLM.from_pretrained("owner/pushed", trust_remote_code=True)
adapted = PeftModel.from_pretrained(base, "owner/adapter").eval()
assert torch.equal(adapted(ids).logits, expected["owner/adapter"])
whole = AutoModelForCausalLM.from_pretrained("owner/adapter", trust_remote_code=True).eval()  # finds base and adapter
assert torch.equal(whole(ids).logits, expected["owner/adapter"])

for name in sys.argv[2:]:
    with open(hf_hub_download(name, "README.md"), encoding="utf-8") as file:
        lines = re.search("```python\\n(.*?)```", file.read(), re.DOTALL)[1]
    assert re.search('revision="[0-9a-f]{{40}}"', lines), lines
    exec(lines)
assert "hf_decoder" not in sys.modules
print("all loaded")
"""


@pytest.fixture(scope="module")
def adapter_of_ours(folder, tmp_path_factory):
    """An adapter that `hf-decoder finetune` made, from a base in a folder."""
    base = tmp_path_factory.mktemp("finetune")
    rows = [json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) for n in range(12)]
    (base / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    flags = ["--model_name_or_path", str(folder), "--train_file", str(base / "rows.jsonl"), "--use_peft"]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "64", "--use_cpu"]
    assert main(["finetune", *flags, "--output_dir", str(base / "adapter"), "--license", "mit"]) == 0
    return base / "adapter"


def test_everything_that_pushes_is_loaded_by_name(
    hub, hub_env, client, folder, adapter_of_ours, run_python, tmp_path, pushes, unexamined
):
    run_python(PUSHES.format(ids=IDS), folder, tmp_path, **hub_env)
    assert hub.repos["owner/pushed"].private
    for name in ("owner/pushed", "owner/trained"):
        files = hub.files(name)
        assert {"model.safetensors", "config.json", "modeling_hf_decoder.py", "tokenizer.json"} <= set(files)
        assert set(json.loads(files["config.json"])["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert ModelCard(hub.files("owner/trained")["README.md"].decode()).data.library_name == "transformers"

    # a whole model and an adapter by our own verb: its base was a folder, and is named as what it was pushed as
    assert pushes(folder, "owner/base")[0] == 0
    for flags, words in (
        ([], "--base_model user/name"),
        (["--base_model", "owner/nowhere"], "owner/nowhere is not on"),
    ):
        code, said = pushes(adapter_of_ours, "owner/ours", *flags)
        assert code == 2 and words in said
    code, said = pushes(adapter_of_ours, "owner/ours", "--base_model", "owner/base")
    assert code == 0 and "every file and every logit is the same" in said
    config = json.loads(hub.files("owner/ours")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] == hub.repos["owner/base"].refs["main"]  # the adapter belongs to these weights
    # nothing of this machine travels
    for name, repo in hub.repos.items():
        for path, data in hub.files(name).items():
            if name in ("owner/base", "owner/ours"):
                assert str(folder.parent).encode() not in data and str(adapter_of_ours.parent).encode() not in data, (
                    name,
                    path,
                )
        assert repo.refs["main"]

    loads = LOADS.format(ids=IDS)
    online = {**hub_env, "HF_HOME": str(tmp_path / "empty")}
    assert "all loaded" in run_python(
        loads, tmp_path / "said.pt", "owner/base", "owner/ours", hide=("hf_decoder",), **online
    )
    assert ModelCard(hub.files("owner/ours")["README.md"].decode()).data.base_model == "owner/base"

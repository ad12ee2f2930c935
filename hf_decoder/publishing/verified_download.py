"""Program that loads a pushed model as a user does who has only transformers.

`fresh_process` runs it, offline, without a token, and with hf_decoder hidden. Its argument is the JSON of a `Job`. It
loads the model twice, from the folder that was sent and by name from the cache, whose files were compared before. It
prints the largest difference of the logits as one line of JSON.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

PACKAGE = "hf_decoder"
LENGTH = 32  # tokens


@dataclass
class Job:
    """What to load. `sent` is the folder that was uploaded, `base` the Hub name of an adapter's base model.

    `trust_remote_code` says that the code of the model, or of the base, is this package's own or trusted by the user.
    """

    sent: str
    repo_id: str
    revision: str
    base: str | None = None
    trust_remote_code: bool = False


def load(name: str, revision: str | None, base: str | None, trust: bool) -> Any:
    """Loads a folder or Hub name on the CPU, in evaluation mode."""
    import transformers

    if base is not None:
        return _load_adapter(name, revision, base, trust)
    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    head = (config.architectures or ["ForCausalLM"])[0].partition("For")[2]
    auto_class = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto_class.from_pretrained(name, revision=revision, trust_remote_code=trust).eval()


def _load_adapter(name: str, revision: str | None, base: str, trust: bool) -> Any:
    import transformers
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    kwargs: dict[str, Any] = {} if revision is None else {"revision": revision}
    labels = {}
    auto_class: Any = transformers.AutoModelForCausalLM
    config = PeftConfig.from_pretrained(name, **kwargs)
    if config.task_type == "SEQ_CLS":
        auto_class = transformers.AutoModelForSequenceClassification
        weights = load_peft_weights(name, device="cpu", **kwargs)
        heads = [value.shape[0] for key, value in weights.items() if key.endswith("score.weight")]
        labels = {"num_labels": heads[0]} if heads else {}
    model = auto_class.from_pretrained(base, revision=config.revision, trust_remote_code=trust, **labels)
    return PeftModel.from_pretrained(model, name, **kwargs).eval()


def logits_of(model: Any) -> Any:
    """Logits of a fixed row of ids: (1, S, V), or (1, classes)."""
    import torch

    config = model.config
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = (torch.arange(length)[None] * 7919 + 11) % config.vocab_size
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def receive(job: Job) -> dict[str, Any]:
    """Loads the model twice, and compares the logits."""
    expected = logits_of(load(job.sent, None, job.base, job.trust_remote_code))
    logits = logits_of(load(job.repo_id, job.revision, job.base, job.trust_remote_code))
    same_shape = expected.shape == logits.shape
    return {
        "max_difference": float((expected - logits).abs().max()) if same_shape else float("inf"),
        "package_hidden": PACKAGE not in sys.modules,
    }


if __name__ == "__main__":
    print(json.dumps(receive(Job(**json.loads(sys.argv[1])))))

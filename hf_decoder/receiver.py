"""What somebody who has only transformers does with a pushed model; run by `fresh_process`, with hf_decoder hidden.

Its argument is the JSON of a `Job`. It downloads the repo into the cache that the environment names, compares every
file with the one that was sent, loads the model twice, as it was sent and by its name, and prints one line of JSON:
the largest difference of their logits.
"""

import filecmp
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "hf_decoder"
LENGTH = 32  # tokens


@dataclass
class Job:
    """`sent` is the folder that was uploaded, `base` the Hub name of an adapter's base model."""

    sent: str
    repo_id: str
    revision: str
    base: str | None = None


def differing_files(sent: Path, received: Path) -> list[str]:
    """Names of files that did not arrive as they were sent."""
    names = sorted(path.relative_to(sent).as_posix() for path in sent.rglob("*") if path.is_file())
    _, different, missing = filecmp.cmpfiles(sent, received, names, shallow=False)
    return sorted([*different, *missing])


def load(name: str, revision: str | None, base: str | None) -> Any:
    """The model of a folder or Hub name, in evaluation mode, on the CPU."""
    import transformers

    if base is not None:
        return _load_adapter(name, revision, base)
    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    head = (config.architectures or ["ForCausalLM"])[0].partition("For")[2]
    auto_class = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto_class.from_pretrained(name, revision=revision, trust_remote_code=True).eval()


def _load_adapter(name: str, revision: str | None, base: str) -> Any:
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
    model = auto_class.from_pretrained(base, revision=config.revision, trust_remote_code=True, **labels)
    return PeftModel.from_pretrained(model, name, **kwargs).eval()


def logits_of(model: Any) -> Any:
    """Logits for a fixed row of ids: [1, tokens, vocabulary], or [1, classes]."""
    import torch

    config = model.config
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = (torch.arange(length)[None] * 7919 + 11) % config.vocab_size
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def receive(job: Job) -> dict[str, Any]:
    """Downloads, compares, loads, computes; the figures of the comparison."""
    from huggingface_hub import snapshot_download

    received = Path(snapshot_download(job.repo_id, revision=job.revision))
    figures: dict[str, Any] = {"differing_files": differing_files(Path(job.sent), received)}
    expected = logits_of(load(job.sent, None, job.base))
    model = load(job.repo_id, job.revision, job.base)
    logits = logits_of(model)
    same_shape = expected.shape == logits.shape
    figures["max_difference"] = float((expected - logits).abs().max()) if same_shape else float("inf")
    figures["model_class"] = type(model).__name__
    figures["package_hidden"] = PACKAGE not in sys.modules
    return figures


if __name__ == "__main__":
    print(json.dumps(receive(Job(**json.loads(sys.argv[1])))))

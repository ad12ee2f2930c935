"""Loads a checkpoint in a fresh process, and writes its logits to a file.

It is handed to a new interpreter as text, because it must also work where this package cannot be found.
Argument: the path of a JSON file with `folder`, `ids`, `threads`, `attention`, `trust_remote_code`, `register`,
`output`.
"""

import json
import sys


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if task["register"]:
        __import__(task["register"])
    logging.set_verbosity_error()
    torch.set_num_threads(task["threads"])
    config = AutoConfig.from_pretrained(task["folder"], trust_remote_code=task["trust_remote_code"])
    config._attn_implementation = task["attention"]  # not what it asks for, which may be a kernel of the Hub
    model = AutoModelForCausalLM.from_pretrained(
        task["folder"],
        config=config,
        dtype=torch.float32,
        attn_implementation=task["attention"],
        trust_remote_code=task["trust_remote_code"],
        use_safetensors=True,
    )
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(task["ids"]), use_cache=False).logits
    save_file({"logits": logits.contiguous()}, task["output"])


if __name__ == "__main__":
    main()

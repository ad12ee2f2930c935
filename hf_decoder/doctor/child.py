"""Program of a fresh process that loads a checkpoint and writes its logits to a file.

The interpreter gets it as text, because it must also run where this package cannot be found. Its argument is the path
of a JSON file with `folder`, `ids`, `threads`, `attention`, `trust_remote_code`, `register` (whether to
import hf_decoder, which registers our classes) and `output`.
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
        import hf_decoder  # noqa: F401
    logging.set_verbosity_error()
    torch.set_num_threads(task["threads"])
    config = AutoConfig.from_pretrained(task["folder"], trust_remote_code=task["trust_remote_code"])
    config._attn_implementation = task["attention"]  # its own choice may be a kernel of the Hub
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

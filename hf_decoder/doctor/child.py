"""What runs in a fresh process: load a checkpoint, write its logits to a file.

It is handed to a new interpreter as text, because it must also work where this package cannot be found.
Arguments: the path of a JSON file with `folder`, `ids`, `threads`, `trust_remote_code`, `hide`, `register`, `output`.
"""

import json
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any


def hide(package: str) -> None:
    """Makes a package look as if it were not installed: no finder finds it, an editable install's own included."""

    def without(find: Callable[..., Any]) -> Callable[..., Any]:
        def find_or_not(name: str, *args: Any, **kwargs: Any) -> Any:
            return None if name.partition(".")[0] == package else find(name, *args, **kwargs)

        return find_or_not

    PathFinder.find_spec = staticmethod(without(PathFinder.find_spec))  # type: ignore[method-assign]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    try:
        __import__(package)
    except ModuleNotFoundError:
        return
    raise SystemExit(f"{package} could not be hidden")


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    if task["hide"]:
        hide(task["hide"])
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

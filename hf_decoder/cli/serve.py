"""`hf-decoder serve FOLDER`: runs the OpenAI-compatible server of `transformers serve` with our classes registered.

transformers' command finds a class only in its own namespace, so it serves neither plugins nor adapters. All flags are
those of that command: `hf-decoder serve --help`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

import hf_decoder
from hf_decoder.cli import load_model, load_tokenizer
from hf_decoder.interop.untrusted_files import check_folder
from hf_decoder.safety.limits import bound_templates

PACKAGES = ("fastapi", "uvicorn", "openai")


def main(argv: Sequence[str]) -> int:
    """Serves until interrupted."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'hf-decoder[serve]'")
    if "--continuous-batching" in argv:
        raise ValueError("leave --continuous-batching out: requests are batched without it")
    import click
    from transformers.cli.transformers import app
    from uvicorn.config import LOGGING_CONFIG

    from hf_decoder.serving.server import install

    for name in hf_decoder.__all__:
        setattr(transformers, name, getattr(hf_decoder, name))
    install(_manager())
    bound_templates()
    for name in argv:
        if Path(name).is_dir():
            check_folder(Path(name))
    for formatter in LOGGING_CONFIG["formatters"].values():
        formatter["use_colors"] = False  # no escape sequence reaches the terminal, not even uvicorn's
    try:
        app(args=["serve", *argv], prog_name="hf-decoder", standalone_mode=False)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    if "--help" in argv:
        raise SystemExit(0)  # like the other verbs after their help
    return 0


def _check_address(host: str, port: int) -> None:
    """Raises ValueError where the server could not listen, before a model is loaded, which takes longer."""

    async def listen() -> None:  # by the call that the server makes itself
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port, start_serving=False)).close()

    try:
        asyncio.run(listen())
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port} cannot be used ({why}); name another port") from None


def _manager() -> type[Any]:
    """transformers' manager of models, which loads folders like every command here, adapters included."""
    import click
    from transformers.cli.serving.model_manager import ModelManager

    from hf_decoder.interop.adapters import merge

    class Manager(ModelManager):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if (command := click.get_current_context(silent=True)) is not None:
                _check_address(command.params["host"], command.params["port"])
            super().__init__(*args, **kwargs)

        def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
            if gguf_file is not None or not Path(model_id_and_revision).is_dir():
                return super()._load_processor(model_id_and_revision, gguf_file=gguf_file)
            return load_tokenizer(model_id_and_revision, trust_remote_code=self.trust_remote_code)

        def _load_model(
            self,
            model_id_and_revision: str,
            tqdm_class: type | None = None,
            progress_callback: Callable[[dict[str, Any]], None] | None = None,
            gguf_file: str | None = None,
        ) -> Any:
            if gguf_file is not None or not Path(model_id_and_revision).is_dir():
                return super()._load_model(model_id_and_revision, tqdm_class, progress_callback, gguf_file=gguf_file)
            settings = {"attn_implementation": self.attn_implementation, "dtype": self.dtype}
            if (quantization := self.get_quantization_config()) is not None:
                settings["quantization_config"] = quantization
            model = load_model(
                model_id_and_revision, trust_remote_code=self.trust_remote_code, device_map=self.device, **settings
            )
            if hasattr(model, "peft_config") and not getattr(model, "is_quantized", False):
                model = merge(model)
            return model.eval()

    return Manager

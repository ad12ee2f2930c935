"""`hf-decoder demo FOLDER...`: opens a page on this machine to talk to a model, or to two side by side."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_decoder.cli import check_package, load_model, load_tokenizer, select_device
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.demo import DemoArguments
from hf_decoder.evaluation.batch_generation import encode_prompt
from hf_decoder.interop.adapters import adapters_near, base_of, is_adapter


@takes_argv
def main(args: DemoArguments) -> int:
    """Loads the models, and serves the page until it is interrupted."""
    check_package("gradio", "demo")
    from hf_decoder.serving.local_page import free_port, serve
    from hf_decoder.serving.page import Page

    port = free_port(args.port)  # before the models are loaded, which takes longer
    choices = _choices(args)
    with suppress(KeyboardInterrupt):  # the way to end it
        serve(Page(choices, columns=min(2, len(choices), len(args.folders))).build(), port)
    return 0


def _choices(args: DemoArguments) -> list[Any]:
    """What the page offers: the folders that were given, then their base models, then the adapters near those."""
    from hf_decoder.serving.conversation import untaught_note
    from hf_decoder.serving.live_generation import Choice, LoadedModel

    given: list[tuple[str, str | None]] = []
    for name in map(_whole_path, args.folders):
        given.append((_whole_path(base_of(name)), name) if is_adapter(name) else (name, None))
    bases = list(dict.fromkeys(base for base, _ in given))
    pairs = [*given, *((base, None) for base in bases)]
    pairs += [(base, str(found)) for base in bases for found in adapters_near(base)]
    unique = len({Path(base).name for base in bases}) == len(bases)
    device = select_device(args.device)
    loaded: dict[str, LoadedModel] = {}
    choices: dict[str, Choice] = {}
    for base in bases:
        model = load_model(base, trust_remote_code=args.trust_remote_code, dtype=args.dtype)
        loaded[base] = LoadedModel(model.to(device).eval())
    for base, adapter in dict.fromkeys(pairs):
        tokenizer = load_tokenizer(adapter or base, trust_remote_code=args.trust_remote_code)
        if tokenizer.chat_template:  # one that cannot be rendered, or never ends, is found here and not in the page
            encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
        name = Path(base).name if unique else base
        if adapter is not None:
            short = f"{name} + {Path(adapter).name}"
            name = f"{name} + {adapter}" if short in choices else short
        note = untaught_note(tokenizer, base, adapter)
        choices[name] = Choice(name, loaded[base], tokenizer, adapter, note)
    return list(choices.values())


def _whole_path(name: str) -> str:
    """The full path of a folder; a name of the Hub as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name

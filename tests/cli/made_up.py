"""A made-up text, the shape of a model for it, and processes in which something goes wrong."""

import os
import random
import resource
import signal

import torch
from transformers import Trainer

from hf_decoder.cli.main import main

SHAPE = "hidden_size=32,num_attention_heads=2,num_key_value_heads=1,num_hidden_layers=2,max_position_embeddings=128"


def made_text(seed: int, lines: int) -> str:
    """Lines of a small made-up language, so that there is something to learn and nothing to download."""
    words = random.Random(seed)
    names, verbs = ["cat", "dog", "bird", "größe"], ["sees", "hears", "likes"]
    return "".join(
        f"the {words.choice(names)} {words.choice(verbs)} the {words.choice(names)}\n" for _ in range(lines)
    )


def kill_in_save(number: int) -> None:
    """Ends this process as nothing else does, when half of the `number`-th file that torch writes is written."""
    save = torch.save
    calls = [0]

    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        calls[0] += 1
        if calls[0] == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def kill_before_mark(number: int) -> None:
    """Ends this process when the `number`-th checkpoint is written in full, but not yet marked."""
    save = Trainer._save_checkpoint
    calls = [0]

    def last_words(self, *args, **kwargs):
        save(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save_checkpoint = last_words


def starve(number: int) -> None:
    """From the `number`-th checkpoint on, no file may grow over 50 kB: the model fits no more."""
    save = Trainer._save_checkpoint
    calls = [0]

    def starved(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        save(self, *args, **kwargs)

    Trainer._save_checkpoint = starved


def child(argv: list[str], cache: str, log: str, fault, number: int) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if fault is not None:
        fault(number)
    raise SystemExit(main(argv))


def kill_late(number: int) -> None:
    from hf_decoder.cli import pretrain

    pretrain.score_held_out = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

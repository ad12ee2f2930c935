"""`hf-decoder presets`: lists the named model shapes and what each costs to train and to serve."""

from __future__ import annotations

from hf_decoder.cli import check_at_least
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.presets import PresetsArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.devices import GIB
from hf_decoder.costs.presets import PRESETS, Shape


@takes_argv
def main(args: PresetsArguments) -> int:
    """Prints one line for each preset."""
    for name in ("vocab_size", "per_device_train_batch_size", "block_size"):
        check_at_least(f"--{name}", getattr(args, name), 1)
    header = ("preset", "parameters", "width", "layers", "heads", "context", "KV B/token", "train FLOP/token")
    rows = [(*header, "train memory", "serve memory")]
    for name in PRESETS:
        config = Shape.of(name, args.vocab_size)
        rows.append(
            (
                name,
                _si(accounting.num_parameters(config)),
                str(config.hidden_size),
                str(config.num_hidden_layers),
                f"{config.num_attention_heads}/{config.num_key_value_heads}",
                str(config.max_position_embeddings),
                f"{accounting.kv_bytes_per_token(config):,}",
                _si(accounting.flops_per_token(config, args.block_size)),
                _gib(accounting.training_bytes(config, args.per_device_train_batch_size, args.block_size)),
                _gib(accounting.serving_bytes(config, args.block_size)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )
    print(
        f"\nVocabulary {args.vocab_size}, rows of {args.block_size} tokens. Heads: query/key-value. KV cache and "
        "serving in bf16, one sequence. Training: AdamW under bf16 autocast, "
        f"{args.per_device_train_batch_size} row(s), an estimate. FLOPs: PaLM, appendix B."
    )
    return 0


def _si(number: float) -> str:
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return str(number)


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"

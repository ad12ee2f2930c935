"""A peer for translation: a stock encoder-decoder of transformers, from scratch, on the rows that `finetune` gets.

    python tests/peers/marian.py TOKENIZER OUTPUT_DIR --source A B --target C D --num_train_epochs 6

Marian's post-norm Transformer (Vaswani et al. 2017), Adam with inverse square root decay and label smoothing as in
Marian's own recipe. What it needs of the machine is what ours needs: bf16 autocast, rows of like length together.
"""

import argparse
import json
import time

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_decoder.data.records import read_lines
from hf_decoder.evaluation.metrics import bleu, chrf
from hf_decoder.training import callbacks


def rows(tokenizer, sources: list[str], targets: list[str]) -> list[dict[str, list[int]]]:
    source = [line for path in sources for line in read_lines(path)]
    target = [line for path in targets for line in read_lines(path)]
    end = [tokenizer.eos_token_id]
    pairs = zip(tokenizer(source)["input_ids"], tokenizer(target)["input_ids"], strict=True)
    return [{"input_ids": a + end, "labels": b + end} for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("output_dir")
    parser.add_argument("--source", nargs="+", required=True)
    parser.add_argument("--target", nargs="+", required=True)
    parser.add_argument("--num_train_epochs", type=float, default=6)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    parser.add_argument("--d_model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ffn_dim", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--test_source", nargs="+", default=[])
    parser.add_argument("--test_target", nargs="+", default=[])
    args = parser.parse_args()

    set_seed(42)
    callbacks.keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.padding_side = "right"
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        encoder_layers=args.layers,
        decoder_layers=args.layers,
        encoder_attention_heads=args.d_model // 64,
        decoder_attention_heads=args.d_model // 64,
        encoder_ffn_dim=args.ffn_dim,
        decoder_ffn_dim=args.ffn_dim,
        dropout=args.dropout,
        max_position_embeddings=512,
        scale_embedding=True,
        activation_function="relu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    model = MarianMTModel(config)
    print(f"{model.num_parameters():,} parameters")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            args.output_dir,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="inverse_sqrt",
            warmup_steps=0.1,
            adam_beta2=0.98,
            adam_epsilon=1e-9,
            label_smoothing_factor=0.1,
            train_sampling_strategy="group_by_length",
            bf16=callbacks.bf16_supported(),
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=rows(tokenizer, args.source, args.target),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    cpu = time.process_time()
    metrics = trainer.train().metrics
    print(json.dumps({**metrics, "cpu_seconds": time.process_time() - cpu}))
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)
    for source, target in zip(args.test_source, args.test_target, strict=True):
        answers = translate(model, tokenizer, read_lines(source))
        references = [[line] for line in read_lines(target)]
        measures = {"bleu": bleu(answers, references), "chrf": chrf(answers, references)}
        print(json.dumps({"source": source, "target": target, **measures}))


@torch.inference_mode()
def translate(model: MarianMTModel, tokenizer, lines: list[str], batch_size: int = 50) -> list[str]:
    """Beam search, 5 beams, as `eval --num_beams 5` has it."""
    model.eval()
    answers = []
    for batch in rows_of(lines, batch_size):
        ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(batch)["input_ids"]]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        output = model.generate(**inputs, num_beams=5, max_new_tokens=100)
        answers += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return answers


def rows_of(lines: list[str], size: int) -> list[list[str]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


if __name__ == "__main__":
    main()

"""The flags of `hf-decoder crossvalidate`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

OUTPUT_DIR = "runs/crossvalidation"
DESCRIPTION = (
    "Holds every part of the rows out once, trains a tokenizer and a classifier on the other parts, from scratch or, "
    "with --pretraining_epochs, from a language model of their texts, and measures on the part held out. Where "
    "scikit-learn is installed, TF-IDF and logistic regression are measured on the same parts. Then trains the model "
    "to be used, on all rows. A run that was interrupted goes on after the folds that --output_dir holds."
)


@dataclass(kw_only=True)
class CrossvalidateArguments:
    """Which rows, how many folds, and the recipe of each."""

    train_file: str = needed("Rows with text and label: .jsonl, .json, .csv, .tsv, .parquet.")
    text_column: str | None = flag(None, "The column that holds the text.")
    label_column: str | None = flag(None, "The column that holds the label.")
    num_folds: int = flag(10, "Parts that are held out in turn.")
    max_folds: int | None = flag(None, "Only the first so many of them.")
    preset: str = flag("nano", "Shape of the model.")
    config_overrides: str | None = flag(
        "hidden_size=128,num_attention_heads=2,num_key_value_heads=2,num_hidden_layers=2,intermediate_size=256,"
        'layer_types=["sliding_attention","full_attention"],sliding_window=3',
        "Changes to the preset's config.",
    )
    vocab_size: int = flag(16384, "Words that the tokenizer of each fold knows at most, all seen twice.")
    pretraining_epochs: float = flag(0, "Epochs as a language model before that.")
    pretraining_learning_rate: float = flag(1e-2, "Peak learning rate of these.")
    pretraining_dropout: float = flag(0.1, "Dropout of these.")
    num_train_epochs: float = flag(5, "Epochs as a classifier.")
    learning_rate: float = flag(4e-3, "Peak learning rate of these.")
    dropout: float = flag(0.3, "Dropout of these.")
    word_dropout: float = flag(0.1, "Share of the tokens that is not shown, in both.")
    teacher_weight: float = flag(
        0.8,
        "Share of the classifier's target that a model of n-grams sets, which learned from the same rows; the label "
        "sets the rest. It also says how to score a text after each of its words. 0: labels alone.",
    )
    per_device_train_batch_size: int = flag(64, "Texts of a step.")
    seed: int = flag(42, "Seed of folds, weights and draws.")
    output_dir: str = flag(OUTPUT_DIR, "Folder for results, predictions and the model of all rows.")
    overwrite_output_dir: bool = flag(False, "Begin again in a folder with results.")


ARGUMENTS = (CrossvalidateArguments,)

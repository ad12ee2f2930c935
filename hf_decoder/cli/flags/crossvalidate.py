"""The flags of `hf-decoder crossvalidate`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

OUTPUT_DIR = "runs/crossvalidation"
DESCRIPTION = (
    "Holds out each fold of the rows in turn, trains a tokenizer and a classifier on the others, and measures on it. "
    "With --pretraining_epochs the classifier starts from a language model of the same texts. Where "
    "scikit-learn is installed, TF-IDF with logistic regression is measured, too. Last it trains the final model on "
    "all rows. An interrupted run goes on after the folds in --output_dir."
)


@dataclass(kw_only=True)
class CrossvalidateArguments:
    """Which rows, how many folds, and the recipe of each."""

    train_file: str = needed("Rows with text and label: .jsonl, .json, .csv, .tsv, .parquet.")
    text_column: str | None = flag(None, "The column that holds the text.")
    label_column: str | None = flag(None, "The column that holds the label.")
    num_folds: int = flag(10, "Folds that are held out in turn.")
    max_folds: int | None = flag(None, "Run only the first so many folds.")
    preset: str = flag("nano", "Shape of the model.")
    config_overrides: str | None = flag(
        "hidden_size=128,num_attention_heads=2,num_key_value_heads=2,num_hidden_layers=2,intermediate_size=256,"
        'layer_types=["sliding_attention","full_attention"],sliding_window=3',
        "Changes to the preset's config.",
    )
    vocab_size: int = flag(16384, "Most words of each fold's tokenizer; each occurs at least twice.")
    pretraining_epochs: float = flag(0, "Epochs as a language model, before those as a classifier.")
    pretraining_learning_rate: float = flag(1e-2, "Peak learning rate of the language model.")
    pretraining_dropout: float = flag(0.1, "Dropout of the language model.")
    num_train_epochs: float = flag(5, "Epochs as a classifier.")
    learning_rate: float = flag(4e-3, "Peak learning rate of the classifier.")
    dropout: float = flag(0.3, "Dropout of the classifier.")
    word_dropout: float = flag(0.1, "Share of the tokens that is hidden, in both.")
    teacher_weight: float = flag(
        0.8,
        "Share of the classifier's target that an n-gram model of the same rows sets; the label sets the rest. It "
        "also scores the text after each word. 0: labels alone.",
    )
    per_device_train_batch_size: int = flag(64, "Texts of a step.")
    seed: int = flag(42, "Seed of folds, weights and draws.")
    output_dir: str = flag(OUTPUT_DIR, "Folder for results, predictions and the final model.")
    overwrite_output_dir: bool = flag(False, "Replace the results in --output_dir.")


ARGUMENTS = (CrossvalidateArguments,)

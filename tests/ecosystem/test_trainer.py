"""Trainer, unchanged: the runs of Llama with the same weights, accumulation, evaluation, resuming."""

from functools import partial

import llama_pairs
import pytest
import torch
from llama_pairs import stock_model
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers import logging as transformers_logging

from hf_decoder import (
    HfDecoderForCausalLM,
    HfDecoderForQuestionAnswering,
    HfDecoderForSequenceClassification,
    HfDecoderForTokenClassification,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

new_model = partial(llama_pairs.new_model, initializer_range=0.1, tie_word_embeddings=True)


def rows(number, low=4, high=24, seed=0):
    """Ragged documents without padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (number,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, 96, (length,), generator=generator)} for length in lengths]


def collate(batch):
    """Right padding; padding and the first two tokens of every row carry no loss."""
    length = max(len(row["input_ids"]) for row in batch)
    ids, labels = torch.zeros(len(batch), length, dtype=torch.long), torch.full((len(batch), length), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch):
        size = len(row["input_ids"])
        ids[i, :size], mask[i, :size] = row["input_ids"], 1
        labels[i, 2:size] = row["input_ids"][2:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class StepLosses(TrainerCallback):
    def __init__(self):
        self.losses, self.grad_norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.grad_norms.append(logs["grad_norm"])


def trainer_for(model, folder, data=None, **kwargs):
    trainer_kwargs = {name: kwargs.pop(name) for name in ("eval_dataset", "compute_metrics") if name in kwargs}
    defaults = {
        "max_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    args = TrainingArguments(folder, **defaults | kwargs)
    recorder = StepLosses()
    trainer = Trainer(
        model, args, data_collator=collate, train_dataset=data or rows(40), callbacks=[recorder], **trainer_kwargs
    )
    trainer.recorder = recorder
    return trainer


def run(model, folder, **kwargs):
    set_seed(3)
    trainer = trainer_for(model, folder, **kwargs)
    trainer.train()
    return trainer.recorder


def same_weights(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# bf16's matrix products differ in the last of 8 bits between the two ways of forming the loss
@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-5),
        ({"gradient_accumulation_steps": 2}, 1e-5),
        ({"label_smoothing_factor": 0.1}, 1e-5),
        ({"gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 1e-2),
    ],
    ids=lambda value: "-".join(value) or "fp32" if isinstance(value, dict) else "",
)
def test_loss_is_llamas_step_by_step(settings, tolerance, tmp_path):
    model = new_model(attention_dropout=0.1)
    settings = {"data": rows(4) * 10} | settings  # few enough to be learned by heart
    stock = run(stock_model(model), tmp_path, **settings)
    ours = run(model, tmp_path, **settings)
    assert len(ours.losses) == 10 and ours.losses[-1] < ours.losses[0]
    assert ours.losses == pytest.approx(stock.losses, abs=tolerance)
    assert ours.grad_norms == pytest.approx(stock.grad_norms, rel=1e-3 if tolerance < 1e-4 else 5e-2)


@pytest.mark.slow
def test_torch_compile_gives_the_eager_losses(tmp_path):
    settings = {"data": rows(16, low=12, high=13), "max_steps": 4}
    eager = run(new_model(), tmp_path, **settings)
    compiled = run(new_model(), tmp_path, torch_compile=True, **settings)
    assert compiled.losses == pytest.approx(eager.losses, abs=1e-4)


def test_one_batch_of_eight_equals_eight_batches_of_one(tmp_path):
    data = rows(16, low=3, high=40, seed=1)
    settings = {"data": data, "max_steps": 2, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    models = [new_model(), new_model()]
    records = [
        run(model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings)
        for model, size in zip(models, (8, 1), strict=True)
    ]
    assert records[0].losses == pytest.approx(records[1].losses, abs=1e-5)
    for (name, whole), single in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(whole, single, atol=1e-6, rtol=1e-4, msg=name)

    # the oracle: the mean over all counted tokens of the eight rows at once
    order = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, collate_fn=lambda batch: batch)
    set_seed(3)
    trainer = trainer_for(new_model(), tmp_path, per_device_train_batch_size=8, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(order) == 2
    with torch.no_grad():
        logits = new_model()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs, targets = logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    losses = [-log_probs[i, j, targets[i, j]] for i, j in (targets != -100).nonzero().tolist()]
    assert records[0].losses[0] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


HEADS = {
    "sequence": (HfDecoderForSequenceClassification, lambda row, n: {"labels": n % 3}),
    "token": (
        HfDecoderForTokenClassification,
        lambda row, n: {"labels": torch.where(torch.arange(len(row)) < n % 4, -100, row % 3)},
    ),
    "question answering": (
        HfDecoderForQuestionAnswering,
        lambda row, n: {"start_positions": n % 3, "end_positions": 3},
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_the_same_from_one_batch_of_eight_and_four_of_two(head, tmp_path):
    kind, answers = HEADS[head]
    data = [{**row, **answers(row["input_ids"], n)} for n, row in enumerate(rows(8, low=6, high=7, seed=1))]
    found = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = new_model(kind, num_labels=3).eval()
        for module in model.modules():  # which would draw otherwise
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        set_seed(3)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = trainer_for(model, tmp_path, data, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **settings)
        trainer.data_collator = default_data_collator
        trainer.train()
        found.append((trainer.recorder.losses[0], trainer.recorder.grad_norms[0], list(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_evaluation_hands_logits_to_compute_metrics(tmp_path):
    model = new_model()
    data = rows(6, seed=2)
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"accuracy": 0.5}

    trainer = trainer_for(
        model, tmp_path, eval_dataset=data, compute_metrics=compute_metrics, per_device_eval_batch_size=6
    )
    metrics = trainer.evaluate()
    batch = collate(data)
    with torch.no_grad():
        outputs = stock_model(model).eval()(**batch)
    assert metrics["eval_accuracy"] == 0.5
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), abs=1e-5)
    torch.testing.assert_close(torch.tensor(seen["logits"]), outputs.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.tensor(seen["labels"]), batch["labels"])


def test_loss_only_evaluation(tmp_path):
    model = new_model()
    data = rows(8, seed=2)
    settings = {"eval_dataset": data, "per_device_eval_batch_size": 4, "prediction_loss_only": True}
    trainer = trainer_for(model, tmp_path, **settings)
    stock = trainer_for(stock_model(model), tmp_path, **settings)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-5)
    assert trainer.predict(data).predictions is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_the_uninterrupted_one(precision, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {"lr_scheduler_type": "cosine", "bf16": precision == "bf16"}
    whole = new_model(attention_dropout=0.1)
    set_seed(3)
    first = trainer_for(whole, tmp_path / "whole", **settings)
    first.train()

    resumed = new_model(seed=9, attention_dropout=0.1)
    set_seed(11)
    second = trainer_for(resumed, tmp_path / "resumed", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert second.recorder.losses == first.recorder.losses[3:]
    assert same_weights(resumed, whole)
    assert not same_weights(whole, new_model(attention_dropout=0.1))


def test_load_best_model_at_end(tmp_path):
    # A learning rate that ruins the model: the best evaluation is the first.
    model = new_model()
    trainer = trainer_for(
        model,
        tmp_path,
        eval_dataset=rows(8, seed=2),
        max_steps=3,
        learning_rate=1.0,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert len(losses) == 3 and trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    kept = HfDecoderForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert same_weights(model, kept)


def test_saved_model_names_its_tied_weight_once(tmp_path):
    from safetensors import safe_open

    trainer = trainer_for(new_model(), tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys() and "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = HfDecoderForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_weights(loaded, trainer.model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_batch_without_labels_to_count_does_not_stop_the_run(tmp_path):
    data = [{"input_ids": torch.tensor([5, 6])}] * 4 + rows(4)  # the first two tokens of a row carry no loss
    recorder = run(new_model(), tmp_path, data=data, per_device_train_batch_size=1, max_steps=8)
    assert torch.tensor(recorder.losses).isfinite().all()
    assert recorder.losses.count(0.0) == 4


def test_classifier_trains(tokenizer, tmp_path):
    set_seed(0)
    shape = {"vocab_size": 300, "pad_token_id": tokenizer.pad_token_id}
    model = new_model(HfDecoderForSequenceClassification, **shape, num_labels=2)
    texts = [("return 0", 0), ("the end of the text", 1)] * 8
    data = [tokenizer(text, return_token_type_ids=False) | {"labels": label} for text, label in texts]
    args = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    metrics = {"compute_metrics": lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}}
    trainer = Trainer(
        model, args, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=data, eval_dataset=data, **metrics
    )
    assert trainer.evaluate()["eval_accuracy"] == 0.5
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_trainer_has_nothing_to_complain_of(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        run(new_model(), tmp_path, max_steps=2, eval_dataset=rows(4), eval_strategy="steps", eval_steps=1)
    assert [record.getMessage() for record in caplog.records] == []

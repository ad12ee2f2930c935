"""The time limit, by a clock that the tests advance, and the metrics of a step."""

import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_decoder.training import throughput
from hf_decoder.training.optimizers import wsd_kwargs
from hf_decoder.training.throughput import (
    MeasuringTrainer,
    StepMetrics,
    TimeLimit,
    matmul_peak,
    parse_duration,
    steps_planned,
)


@pytest.mark.parametrize(
    "text, seconds", [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("1h1m1s", 3661)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 minutes", "-5m", "0s", "5m3"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="30m"):
        parse_duration(text)


class Clock(TrainerCallback):
    """A clock that advances by `pace` per step, and records the learning rate of every step."""

    def __init__(self, pace, stop_at=None):
        self.now, self.rates, self._pace, self._stop_at = 0.0, [], pace, stop_at

    def __call__(self):
        return self.now

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.now += self._pace(state.global_step)
        if state.global_step == self._stop_at:
            control.should_save = control.should_training_stop = True


def tiny_trainer(folder, *callbacks, max_steps=200, trainer_class=MeasuringTrainer, **settings):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = torch.randint(0, 16, (64, 8)).tolist()
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": max_steps,
            "warmup_steps": 2,
            "learning_rate": 1.0,
            "optim": "sgd",
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": wsd_kwargs(max_steps),
            "use_cpu": True,
            "save_steps": 1000,
            "disable_tqdm": True,
            "report_to": "none",
            "logging_steps": 5,
            "include_num_input_tokens_seen": "all",
            **settings,
        }
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return trainer_class(LlamaForCausalLM(config), args, train_dataset=dataset, callbacks=list(callbacks))


def limited(folder, clock, seconds, **settings):
    return tiny_trainer(folder, clock, TimeLimit(seconds, clock=clock), **settings)


def test_the_plateau_ends_so_that_the_decay_fits(tmp_path):
    clock = Clock(lambda step: 2.0)
    trainer = limited(tmp_path, clock, 50.0)
    trainer.train()
    # 25 steps fit: warm-up of 2, plateau up to 60% of them, then a line to zero
    assert trainer.state.global_step == 25 and clock.now == 50.0
    assert clock.rates == pytest.approx([0.0, 0.5, *[1.0] * 14, *[(25 - step) / 10 for step in range(16, 25)]])
    assert (tmp_path / "checkpoint-25").is_dir()


@pytest.mark.parametrize("seconds", [48.0, 47.0, 9.0, 3.0])
def test_the_last_loss_is_logged_wherever_the_limit_ends_the_run(tmp_path, seconds):
    trainer = limited(tmp_path, Clock(lambda step: 2.0 if step < 4 else 1.0), seconds)
    trainer.train()
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] == trainer.state.global_step and len(set(losses)) == len(losses)


def test_steps_that_become_slower_shorten_the_decay(tmp_path):
    clock = Clock(lambda step: 1.0 if step <= 70 else 2.0)
    trainer = limited(tmp_path, clock, 100.0)
    trainer.train()
    assert 80 <= trainer.state.global_step <= 86 and clock.now <= 100.0
    assert clock.rates[-1] < 0.2
    assert all(before >= after for before, after in zip(clock.rates[2:], clock.rates[3:], strict=False))


def test_a_first_step_that_compiles_says_nothing_of_the_others(tmp_path):
    clock = Clock(lambda step: 20.0 if step == 1 else 1.0)
    trainer = limited(tmp_path, clock, 100.0)
    trainer.train()
    assert trainer.state.global_step == 81 and clock.now == 100.0


def test_a_schedule_that_fits_is_not_touched(tmp_path):
    clock, free = Clock(lambda step: 1.0), Clock(lambda step: 1.0)
    trainer = limited(tmp_path / "limited", clock, 30.0, max_steps=30)
    trainer.train()
    tiny_trainer(tmp_path / "free", free, max_steps=30).train()
    assert clock.rates == free.rates and trainer.state.global_step == 30


@pytest.mark.parametrize("stop_at", [8, 20])  # on the plateau and in the decay
def test_a_resumed_run_keeps_to_the_limit_of_the_whole(tmp_path, stop_at):
    first = Clock(lambda step: 2.0, stop_at=stop_at)
    limited(tmp_path, first, 50.0).train()
    second = Clock(lambda step: 2.0)
    trainer = limited(tmp_path, second, 50.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop_at}"))
    assert first.now + second.now <= 50.0 and trainer.state.global_step == 25
    whole = Clock(lambda step: 2.0)
    limited(tmp_path / "whole", whole, 50.0).train()
    assert first.rates + second.rates == pytest.approx(whole.rates)
    assert steps_planned(trainer.state.stateful_callbacks, 200) == 25
    assert steps_planned({}, 200) == 200


def test_a_limit_can_be_added_to_a_run_that_had_none(tmp_path):
    tiny_trainer(tmp_path, Clock(lambda step: 1.0, stop_at=5)).train()
    clock = Clock(lambda step: 1.0)
    trainer = limited(tmp_path, clock, 10.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 15


def test_a_schedule_without_steps_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match="cosine"):
        TimeLimit(10.0).on_train_begin(args, TrainerState(), TrainerControl(), lr_scheduler=object())


class SlowData(MeasuringTrainer):
    def _get_num_items_in_batch(self, *args):
        time.sleep(0.05)
        return super()._get_num_items_in_batch(*args)


def test_speed_and_waiting_are_in_the_log(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=10, trainer_class=SlowData)
    trainer.callback_handler.callbacks.insert(0, StepMetrics(trainer, block_size=8, peak=1e9))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    # 5 steps of 8 rows of 8 tokens in no less than 5 x 0.05 s
    for entry in logs:
        assert 5 * 64 / seconds < entry["tokens_per_second"] < 64 / 0.05
        assert 0.3 < entry["data_wait"] <= 1.0
        # of one layer: 4 x 8 x 8 attention, 3 x 8 x 8 MLP, and a head of 8 x 16; attention over 8 positions
        flops = 6 * (7 * 64 + 128) + 12 * 8 * 8
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e9, abs=1e-4)


def test_the_figures_of_a_step_counted_by_hand(monkeypatch):
    """Between the last save, evaluation or log and this log: 3 s, 1 s of it waiting, 1000 tokens on two devices."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    trainer = SimpleNamespace(model=SimpleNamespace(config=config), data_seconds=7.0)
    args = SimpleNamespace(world_size=2)
    state = TrainerState(num_input_tokens_seen=50, log_history=[{}, {"loss": 2.0}])
    metrics = StepMetrics(trainer, block_size=8, peak=3e6)
    # a token: 6 for each of the 7 x 64 + 128 weights, 12 for each of 8 channels and 8 positions, in all 4224 FLOPs;
    # 500 tokens of a device in 3 s
    expected = {"loss": 2.0, "tokens_per_second": 333.3, "mfu": 0.2347, "data_wait": 0.33333}
    for restart in (metrics.on_train_begin, metrics.on_evaluate, metrics.on_save, None):
        if restart:
            now[0] += 5.0
            trainer.data_seconds += 2.0
            state.num_input_tokens_seen += 70
            restart(args, state, None)
        now[0] += 3.0
        trainer.data_seconds += 1.0
        state.num_input_tokens_seen += 1000
        logs = {"loss": 2.0}
        metrics.on_log(args, state, None, logs={"eval_loss": 2.0})
        metrics.on_log(args, state, None, logs=logs)
        assert logs == expected and state.log_history == [{}, expected]


def test_matmul_peak_is_that_of_the_fastest_of_four_products(monkeypatch):
    readings = iter([0.0, 2.0, 10.0, 10.5, 20.0, 24.0, 30.0, 31.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(readings))
    assert matmul_peak(torch.device("cpu"), torch.float32, size=8) == 8 * 8 * 8 * 2 / 0.5


def test_matmul_peak_is_no_less_than_what_a_product_reaches():
    peak = matmul_peak(torch.device("cpu"), torch.float32, size=256)
    assert 1e8 < peak < 1e15

"""Warnings of spikes, and signals, without a training around them."""

import os
import signal

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_decoder.training.stop_conditions import StopOnSignal, WarnOfSpikes


def warned(capsys, logs) -> list[str]:
    callback, args = WarnOfSpikes(), None
    for step, entry in enumerate(logs, 1):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        callback.on_log(args, state, TrainerControl(), logs=entry)
    return capsys.readouterr().err.splitlines()


def test_a_loss_that_falls_and_wobbles_is_no_spike(capsys):
    logs = [{"loss": 8 * 0.95**i + 0.05 * (i % 3), "grad_norm": 1 + i % 4} for i in range(100)]
    assert warned(capsys, [*logs, {"eval_loss": 99.0}]) == []


def test_a_spike_of_the_loss_and_of_the_gradient(capsys):
    calm = [{"loss": 3.0 + 0.01 * (i % 5), "grad_norm": 1.0} for i in range(30)]
    lines = warned(capsys, [*calm, {"loss": 4.5, "grad_norm": 1.0}, {"loss": 3.0, "grad_norm": 30.0}, *calm])
    assert len(lines) == 2
    assert "step 31" in lines[0] and "4.500" in lines[0]
    assert "step 32" in lines[1] and "gradient norm" in lines[1] and "30" in lines[1]


def test_the_first_steps_are_no_spikes(capsys):
    assert warned(capsys, [{"loss": value} for value in (3.0, 9.0, 2.0, 8.0)]) == []


def test_the_handlers_are_put_back_and_a_second_signal_is_not_held(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState()
    with StopOnSignal() as stop:
        control = TrainerControl()
        stop.on_step_end(args, state, control)
        assert not control.should_save and not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        stop.on_step_end(args, state, control)
        assert control.should_save and control.should_training_stop
    with StopOnSignal():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

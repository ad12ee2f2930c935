"""Which checkpoints count as whole, and which are deleted."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from hf_decoder.training.checkpoints import (
    MARK,
    CheckpointKeeper,
    check_same_run,
    checkpoint_to_resume,
    checkpoints,
    describe_run,
    is_complete,
    last_complete,
    mark_complete,
)
from hf_decoder.training.optimizers import describe_recipe


def write(folder: Path, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_bytes(b"x" * 100)
    if whole:
        mark_complete(checkpoint, {})
    return checkpoint


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_whole_is_what_is_marked_and_has_every_byte(tmp_path):
    checkpoint = write(tmp_path, 5)
    assert is_complete(checkpoint)
    (checkpoint / "of-the-user.txt").touch()  # further files do no harm
    assert is_complete(checkpoint)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 50)):
        for name in ("model.safetensors", "optimizer.pt", MARK):
            broken = tmp_path / "broken" / "checkpoint-5"
            shutil.copytree(checkpoint, broken)
            damage(broken / name)
            assert not is_complete(broken)
            shutil.rmtree(broken)
    assert not is_complete(write(tmp_path, 6, whole=False))
    assert not is_complete(tmp_path / "nowhere")


def test_the_last_whole_one_is_found_behind_half_written_ones(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    write(tmp_path, 100, whole=False)
    (tmp_path / "checkpoint-200").touch()  # a file
    (tmp_path / "checkpoint-300-old").mkdir()
    assert last_complete(tmp_path).name == "checkpoint-10"
    assert checkpoint_to_resume("true", tmp_path) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(None, tmp_path) is None and checkpoint_to_resume("false", tmp_path) is None
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-5"), tmp_path) == str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="not whole"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-100"), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        checkpoint_to_resume("true", tmp_path / "nowhere")


def saved(keeper: CheckpointKeeper, folder: Path, step: int, best: str | None = None) -> list[str]:
    """Saves a checkpoint at `step` as Trainer does; returns the folders as a crash before the mark leaves them."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True)
    state = TrainerState(global_step=step, is_world_process_zero=True, best_model_checkpoint=best)
    keeper.on_step_end(args, state, TrainerControl())
    write(folder, step, whole=False)
    before = names(folder)
    keeper.on_save(args, state, TrainerControl())
    return before


def test_the_one_before_goes_only_after_the_next_is_whole(tmp_path):
    keeper = CheckpointKeeper({}, save_total_limit=1)
    saved(keeper, tmp_path, 5)
    assert saved(keeper, tmp_path, 10) == ["checkpoint-5", "checkpoint-10"]
    assert names(tmp_path) == ["checkpoint-10"] and is_complete(tmp_path / "checkpoint-10")


def test_half_written_ones_do_not_count_and_are_cleared_away(tmp_path):
    keeper = CheckpointKeeper({}, save_total_limit=2)
    saved(keeper, tmp_path, 5)
    write(tmp_path, 7, whole=False)
    write(tmp_path, 8, whole=False)
    saved(keeper, tmp_path, 10)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-10"]


@pytest.mark.parametrize("limit", [None, 0])
def test_no_limit_keeps_all_that_is_whole(tmp_path, limit):
    keeper = CheckpointKeeper({}, save_total_limit=limit)
    for step in (5, 10, 15):
        saved(keeper, tmp_path, step)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]


def test_the_best_one_is_kept_beside_the_limit(tmp_path):
    keeper = CheckpointKeeper({}, save_total_limit=1)
    for step in (5, 10, 15):
        saved(keeper, tmp_path, step, best=str(tmp_path / "checkpoint-5"))
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-15"]


def test_a_run_that_went_back_leaves_the_later_ones_behind(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / "checkpoint-10" / "of-the-old-run").touch()
    keeper = CheckpointKeeper({}, save_total_limit=3)
    saved(keeper, tmp_path, 10)  # resumed from 5
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-10"]
    assert not (tmp_path / "checkpoint-10" / "of-the-old-run").exists()


def test_an_error_elsewhere_is_not_blamed_on_the_disk(tmp_path):
    keeper = CheckpointKeeper({})
    saved(keeper, tmp_path, 5)
    with pytest.raises(RuntimeError, match="out of memory"), keeper.explain_failed_save(tmp_path):
        raise RuntimeError("out of memory")
    assert is_complete(tmp_path / "checkpoint-5")


def test_what_differs_is_named(tmp_path, tokenizer):
    def run(hidden=8, block=64, **trained):
        config = LlamaConfig(hidden_size=hidden, num_attention_heads=2, vocab_size=32)
        return describe_run(config, tokenizer, {"block_size": block}, trained_tokenizer=trained)

    checkpoint = write(tmp_path, 5, whole=False)
    mark_complete(checkpoint, run(vocab_size=300))
    assert json.loads((checkpoint / MARK).read_text())["run"]["model"]["hidden_size"] == 8
    check_same_run(checkpoint, run(vocab_size=300))
    check_same_run(checkpoint, run())  # the tokenizer given by name, the same one
    with pytest.raises(ValueError, match="model differs, hidden_size was 8 and is 16 now"):
        check_same_run(checkpoint, run(hidden=16, vocab_size=300))
    with pytest.raises(ValueError, match="data differs, block_size was 64 and is 32 now"):
        check_same_run(checkpoint, run(block=32, vocab_size=300))
    with pytest.raises(ValueError, match="tokenizer differs, vocab_size was 300 and is 400 now"):
        check_same_run(checkpoint, run(vocab_size=400))


def test_a_checkpoint_that_tells_no_recipe_goes_on_with_any(tmp_path, tokenizer):
    def run(rate):
        config = LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=32)
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, learning_rate=rate, lr_scheduler_type="cosine"
        )
        return describe_run(config, tokenizer, {}, recipe=describe_recipe(args, "sgd"))

    checkpoint = write(tmp_path, 5, whole=False)
    mark_complete(checkpoint, run(0.1))
    assert json.loads((checkpoint / MARK).read_text())["run"]["recipe"]["lr_scheduler_type"] == "cosine"
    check_same_run(checkpoint, run(0.1))
    with pytest.raises(ValueError, match=r"recipe differs, learning_rate was 0\.1 and is 0\.2 now"):
        check_same_run(checkpoint, run(0.2))
    mark_complete(checkpoint, {part: what for part, what in run(0.1).items() if part != "recipe"})
    check_same_run(checkpoint, run(0.2))


def test_another_number_of_processes_goes_on_where_a_step_takes_as_many_rows(tmp_path, tokenizer):
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=32)

    def run(processes=1, rows=8, steps=1, seed=42):
        args = SimpleNamespace(per_device_train_batch_size=rows, seed=seed, data_seed=None)
        args.gradient_accumulation_steps, args.world_size = steps, processes
        return describe_run(config, tokenizer, {}, args=args)

    checkpoint = write(tmp_path, 5, whole=False)
    mark_complete(checkpoint, run())
    for same in (run(), run(processes=2, rows=4), run(processes=2, rows=2, steps=2), run(rows=4, steps=2)):
        check_same_run(checkpoint, same)
    for other, words in [
        (run(rows=4), "the training differs, rows_per_step was 8 and is 4 now"),
        (run(steps=2), "rows_per_step was 8 and is 16"),
        (run(processes=2), "rows_per_step was 8 and is 16"),
        (run(processes=2, rows=4, seed=1), "seed was 42 and is 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_same_run(checkpoint, other)
    mark_complete(checkpoint, {part: what for part, what in run().items() if part != "training"})
    check_same_run(checkpoint, run(rows=4))

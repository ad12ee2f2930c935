"""The progress bar, curve and samples that are added to Trainer, and the check of the output folder."""

import io
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import enable_progress_bars
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.data.tokenization import train_tokenizer
from hf_decoder.training import callbacks

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model_and_tokenizer():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sees the dog\n" * 50], vocab_size=280)
    config = HfDecoderConfig(vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=0, **SHAPE)
    return HfDecoderForCausalLM(config), tokenizer


def test_check_output_dir(tmp_path):
    def check(folder, **kwargs):
        callbacks.check_output_dir(folder, **{"overwrite": False, "resume": False, **kwargs})

    check(tmp_path)
    check(tmp_path / "new")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"--overwrite_output_dir to replace it, --resume_from_checkpoint to go on"):
        check(tmp_path)
    with pytest.raises(ValueError, match=r"--overwrite_output_dir to replace it, or another --output_dir"):
        check(tmp_path, resume=None)  # of a command that cannot resume
    check(tmp_path, overwrite=True)
    check(tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        check(tmp_path / "config.json", overwrite=True)


def test_an_earlier_run_is_cleared_but_for_what_is_overwritten(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/trainer_state.json", "all_results.json", "notes.md"):
        (tmp_path / name).touch()
    assert callbacks.is_checkpoint(tmp_path / "checkpoint-5") and not callbacks.is_checkpoint(tmp_path)
    for _ in range(2):  # and again, where nothing is left
        callbacks.clear_earlier_run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_an_output_folder_that_cannot_be_made_is_noticed_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "new", tmp_path / "file" / "new" / "deeper", Path("/proc/new")):
        if folder.parents[-2].exists():
            with pytest.raises(ValueError, match=f"--output_dir {folder} cannot be made in .*; name another folder"):
                callbacks.check_output_dir(folder, overwrite=True)
    callbacks.check_output_dir(tmp_path / "new" / "deeper", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(callbacks.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        callbacks.check_output_dir(tmp_path, overwrite=True)


def test_speed_bar_shows_tokens_a_second_and_starts_where_a_run_was_resumed(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=10, global_step=4, num_input_tokens_seen=4000, is_world_process_zero=True)
    bar = callbacks.SpeedBar()
    bar.on_train_begin(args, state, control)
    assert bar.training_bar.n == 4
    state.global_step, state.num_input_tokens_seen = 6, 6000
    bar.on_step_end(args, state, control)
    assert bar.training_bar.n == 6
    now[0] += 0.5
    bar.on_log(args, state, control, logs={"loss": 2.5})
    bar.on_log(args, state, control, logs={"eval_loss": 2.25})
    bar.on_log(args, state, control, logs={"train_runtime": 3.0})
    bar.on_train_end(args, state, control)
    shown = screen.getvalue()
    assert "loss 2.500, 4,000 tokens/s" in shown
    assert "step 6: held-out loss 2.250" in capsys.readouterr().out
    assert "6/10" in shown


def test_speed_bar_stays_silent_on_other_processes(tmp_path):
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=10, is_world_process_zero=False)
    bar = callbacks.SpeedBar()
    bar.on_train_begin(args, state, control)
    bar.on_log(args, state, control, logs={"loss": 2.5})
    bar.on_evaluate(args, state, control)
    assert bar.training_bar is None


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    return figures


def test_loss_curve_draws_what_was_logged(tmp_path, drawn):
    history = [
        {"step": 1, "loss": 5.0, "learning_rate": 0.1},
        {"step": 10, "loss": 4.0},
        {"step": 10, "eval_loss": 4.5},
        {"step": 20, "loss": 3.0},
        {"step": 20, "eval_loss": 3.6, "eval_runtime": 1.0},
        {"step": 20, "train_runtime": 9.0, "train_loss": 4.0},
        {"step": 20, "eval_loss": 3.5, "eval_runtime": 1.0},  # once more, at the end
    ]
    path = tmp_path / "curve.png"
    callbacks.plot_loss_curve(history, path, title="A title", bytes_per_token=4.0, xz_bits_per_byte=1.5)
    axes = drawn[0].axes[0]
    train, held_out, level = axes.lines
    assert train.get_xydata().tolist() == [[1, 5.0], [10, 4.0], [20, 3.0]]
    assert held_out.get_xydata().tolist() == [[10, 4.5], [20, 3.5]]
    # 1.5 bits a byte x 4 bytes a token x ln 2 nats a bit
    assert level.get_ydata()[0] == pytest.approx(4.158883083)
    assert axes.get_title() == "A title"
    assert axes.get_xlabel() == "optimizer steps" and axes.get_ylabel() == "loss (nats per token)"
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["training", "held out"]
    with Image.open(path) as picture:
        picture.verify()


def test_loss_curve_says_what_its_loss_counts_and_shows_a_single_point(tmp_path, drawn):
    callbacks.plot_loss_curve([{"step": 1, "loss": 5.0}], tmp_path / "curve.png", title="A title", unit="nats per row")
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "loss (nats per row)"
    assert axes.lines[0].get_marker() not in (None, "", "None")


@pytest.mark.parametrize("steps, expected", [(1, 1), (6, 1), (45, 2), (200, 10), (100_000, 10)])
def test_a_short_run_has_a_curve_too(steps, expected):
    assert callbacks.logging_steps(steps) == expected


def test_loss_curve_of_an_empty_history_is_still_a_picture(tmp_path):
    callbacks.plot_loss_curve([], tmp_path / "curve.png", title="Nothing yet")
    with Image.open(tmp_path / "curve.png") as picture:
        picture.verify()


def test_held_out_prompts_are_beginnings_spread_over_the_texts():
    texts = [f"line {i}\n" * 100 for i in range(10)] + ["", "  \n"]
    prompts = callbacks.held_out_prompts(texts, count=4, max_chars=50)
    assert [prompt.splitlines()[0] for prompt in prompts] == ["line 0", "line 2", "line 5", "line 7"]
    assert all(text.startswith(prompt) for prompt, text in zip(prompts, [texts[i] for i in (0, 2, 5, 7)], strict=True))
    assert all(len(prompt) <= 50 and prompt.endswith(tuple("0257")) for prompt in prompts)
    assert callbacks.held_out_prompts(["ab"], count=4) == ["a"]
    assert callbacks.held_out_prompts(["", " "]) == []


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("aaaaa\n" + "b" * 20, "aaaaa\nbbbb"),  # a line that ends in the first half is not the end
        ("aaaaaa\n" + "b" * 20, "aaaaaa"),
        ("aaaaaaaaa\nb\n" + "b" * 20, "aaaaaaaaa"),
        ("  abcd", "abc"),  # half of the text
        ("a", "a"),
    ],
)
def test_a_prompt_of_ten_characters_at_most(text, prompt):
    assert callbacks.held_out_prompts([text], max_chars=10) == [prompt]


def test_a_resumed_run_counts_its_own_tokens_for_the_speed_and_all_for_the_sum(tmp_path):
    (tmp_path / "optimizer.pt").touch()
    saved = TrainerState(global_step=3, num_input_tokens_seen=1000, epoch=0.5)
    saved.save_to_json(str(tmp_path / "trainer_state.json"))
    resumed = []

    def train(resume_from_checkpoint):
        resumed.append(resume_from_checkpoint)
        return SimpleNamespace(metrics={"train_runtime": 4.0})

    trainer = SimpleNamespace(
        train=train,
        state=TrainerState(global_step=7, num_input_tokens_seen=9000),
        accelerator=SimpleNamespace(state=SimpleNamespace()),
        is_deepspeed_enabled=False,
    )
    counted = {"num_input_tokens_seen": 9000, "train_steps": 7, "planned_steps": 8, "train_runtime": 4.0}
    assert callbacks.train(trainer, str(tmp_path), 8) == counted | {"train_tokens_per_second": (9000 - 1000) / 4}
    assert callbacks.train(trainer, None, 8) == counted | {"train_tokens_per_second": 9000 / 4}
    assert resumed == [str(tmp_path), None]
    done = {"epoch": 0.5, "num_input_tokens_seen": 1000, "train_steps": 3, "planned_steps": 3}
    assert callbacks.train(trainer, str(tmp_path), 3, finished=True) == done and len(resumed) == 2
    assert callbacks.is_finished(tmp_path, 3) and not callbacks.is_finished(tmp_path, 4)
    callbacks.check_steps_left(tmp_path, 3, "--max_steps")
    with pytest.raises(ValueError, match=r"--max_steps ends the training after step 2, and .* has taken 3 steps"):
        callbacks.check_steps_left(tmp_path, 2, "--max_steps")


def test_complete_continues_repeatably_and_leaves_the_random_state(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.generation_config.update(do_sample=True)
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    # the second prompt is longer than the model reads
    prompts = ["the cat", "the dog sees " * 50]
    first = callbacks.draw_samples(model, tokenizer, prompts, max_new_tokens=8)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert [prompt for prompt, _ in first] == prompts
    assert first == callbacks.draw_samples(model, tokenizer, prompts, max_new_tokens=8)
    assert first != callbacks.draw_samples(model, tokenizer, prompts, max_new_tokens=8, seed=1)


@pytest.mark.parametrize(("asked", "read", "new"), [(8, 64 - 8, 8), (100, 32, 32)])
def test_a_prompt_and_its_completion_fit_into_the_model(asked, read, new, model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    calls = []

    def generate(ids, max_new_tokens, **settings):
        calls.append((ids.shape[1], max_new_tokens))
        return torch.cat([ids, ids[:, :1]], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    ((_, completion),) = callbacks.draw_samples(model, tokenizer, ["the dog sees " * 50], max_new_tokens=asked)
    assert calls == [(read, new)]
    # the first token that was read: the end of the prompt is kept
    assert completion == tokenizer.decode(tokenizer("the dog sees " * 50)["input_ids"][-read])


def test_packed_rows_ask_for_the_loss_alone():
    batch = callbacks.collate_rows([{"labels": [1, 2]}, {"labels": [3, 4]}])
    assert batch["labels"].tolist() == [[1, 2], [3, 4]] and batch["skip_logits"] is True


@pytest.mark.parametrize("quiet", [True, False])
def test_our_bar_replaces_that_of_trainer(quiet):
    there = [callbacks.ProgressCallback]
    trainer = SimpleNamespace(
        args=SimpleNamespace(use_cpu=False, disable_tqdm=quiet),
        add_callback=there.append,
        remove_callback=there.remove,
    )
    more = callbacks.CurveAtSave()
    callbacks.add_callbacks(trainer, more)
    assert more in there and (callbacks.ProgressCallback in there) == quiet
    assert any(isinstance(bar, callbacks.SpeedBar) for bar in there) != quiet


def test_samples_are_fenced_whatever_they_hold(tmp_path):
    path = tmp_path / "samples.md"
    callbacks.write_samples(path, [("a prompt", "has ```` four ticks")])
    text = path.read_text(encoding="utf-8")
    assert "`````text\nhas ```` four ticks\n`````" in text
    assert "## 1\n\nPrompt:\n\n```text\na prompt\n```" in text


def test_samples_in_training_come_every_so_many_steps_and_from_one_process(model_and_tokenizer, monkeypatch, tmp_path):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(model, "generate", lambda ids, **settings: torch.cat([ids, ids[:, :1]], dim=1))
    args = SimpleNamespace(output_dir=str(tmp_path / "new"))
    callback = callbacks.SampleText(tokenizer, ["the cat"], steps=2)
    path = tmp_path / "new" / "samples_in_training.md"
    for step in range(1, 5):
        callback.on_step_end(args, TrainerState(global_step=step, is_world_process_zero=False), None, model=model)
    assert not path.exists()
    for step in range(1, 5):
        callback.on_step_end(args, TrainerState(global_step=step, is_world_process_zero=True), None, model=model)
    samples = path.read_text(encoding="utf-8")
    assert [line for line in samples.splitlines() if line.startswith("#")] == ["# Step 2", "# Step 4"]
    assert samples.count("Prompt:\n\n```text\nthe cat\n```\n\nCompletion:\n") == 2
    next(model.parameters()).ds_id = 3  # in parts: every process takes part, one writes
    callback.on_step_end(args, TrainerState(global_step=6, is_world_process_zero=False), None, model=model)
    del next(model.parameters()).ds_id
    assert path.read_text(encoding="utf-8") == samples


def test_stage_records_its_time(monkeypatch, capsys):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    seconds: dict[str, float] = {}
    with callbacks.stage("pack", seconds):
        pass
    assert seconds == {"pack_runtime": 2.5}
    assert capsys.readouterr().out == "pack: 2.5 s\n"


def test_bf16_is_for_cpus_that_multiply_it(monkeypatch):
    def chosen(**flags):
        args = SimpleNamespace(**flags)
        callbacks.choose_bf16(args)
        return args.bf16

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert callbacks.bf16_supported()
    assert chosen(bf16=None, fp16=False) and not chosen(bf16=None, fp16=True) and not chosen(bf16=False, fp16=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not callbacks.bf16_supported()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    for cuda in (False, True):  # the accelerator of a Mac, and a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert callbacks.bf16_supported() == cuda
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not chosen(bf16=None, fp16=False) and chosen(bf16=True, fp16=False)


def test_only_the_main_process_prints(capsys):
    for index in (0, 1):
        with callbacks.quiet_but_for_main_process(SimpleNamespace(process_index=index)):
            print(f"process {index}")
    enable_progress_bars()
    assert capsys.readouterr().out == "process 0\n"


@pytest.mark.parametrize("libc", ["glibc", ""])
def test_what_glibc_is_asked_for(libc, monkeypatch):
    asked = []
    library = SimpleNamespace(
        mallopt=lambda *option: asked.append(option), malloc_trim=lambda pad: asked.append(("trim", pad))
    )
    monkeypatch.setattr(callbacks.platform, "libc_ver", lambda: (libc, "2.39"))
    monkeypatch.setattr(callbacks.ctypes, "CDLL", lambda name: library)
    callbacks.keep_freed_memory()
    trim = callbacks.TrimMemory()
    for step in range(1, 149):
        trim.on_step_end(None, SimpleNamespace(global_step=step), None)
    # malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3; the largest int; and steps 50 and 100
    assert asked == ([(-1, 2147483647), (-3, 2147483647), ("trim", 0), ("trim", 0)] if libc else [])


KEEPS_AND_TRIMS = """
from pathlib import Path
from types import SimpleNamespace

import torch

from hf_decoder.training import callbacks


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


callbacks.keep_freed_memory()
between, blocks = [], []
for _ in range(32):  # what stays between the blocks keeps glibc from giving back the end of the heap alone
    blocks.append(torch.ones(2**22))
    between.append(torch.ones(8))
full = resident()
blocks.clear()
kept = resident()
trim = callbacks.TrimMemory()
for step in range(1, 50):
    trim.on_step_end(None, SimpleNamespace(global_step=step), None)
before = resident()
trim.on_step_end(None, SimpleNamespace(global_step=50), None)
print(full, kept, before, resident())
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_freed_memory_is_kept_and_given_back_now_and_then(run_python):
    full, kept, before, after = map(int, run_python(KEEPS_AND_TRIMS).splitlines()[0].split())
    blocks = 32 * 2**24
    assert kept > full - blocks // 4 and before > full - blocks // 4
    assert after < full - blocks // 2

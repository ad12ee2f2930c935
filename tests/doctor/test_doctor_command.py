"""`hf-decoder doctor`: table, JSON, exit codes, and what is said to a wrong call."""

import json

import pytest
from patients import edit_json

from hf_decoder.cli.main import main
from hf_decoder.doctor import CHECKS, LEVELS, run_doctor


def test_a_table_a_file_and_exit_code_0(healthy, tmp_path, capsys):
    file = tmp_path / "report.json"
    folder = str(healthy["ours"])
    assert main(["doctor", folder, "--rows", "formats", "load", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "safetensors only, no pickle" in printed and "2 passed, 0 failed" in printed
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values["ok"] and [report["checkpoint"] for report in values["reports"]] == [folder]
    rows = values["reports"][0]["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [("formats", "pass"), ("load", "pass")]


def test_exit_code_1_says_what_it_means_and_how_to_fix_it(llama, capsys):
    (llama / "README.md").unlink()
    assert main(["doctor", str(llama), "--rows", "card", "formats"]) == 1
    printed = capsys.readouterr().out
    assert "seen:  there is no README.md" in printed and "means: " in printed and "fix:   " in printed


def test_checkpoints_side_by_side(healthy, llama, capsys):
    edit_json(llama / "generation_config.json", eos_token_id=5)
    assert main(["doctor", str(healthy["ours"]), str(llama), "--rows", "special_ids", "pad"]) == 1
    printed = capsys.readouterr().out
    assert "(hf_decoder)" in printed and "(llama)" in printed
    line = next(line for line in printed.splitlines() if "special_ids" in line)
    assert line.index("pass") < line.index("fail")
    assert printed.count("fix:") == 1


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(llama, capsys):
    (llama / "\x1b]0;owned\x07.pkl").write_bytes(b"")
    assert main(["doctor", str(llama), "--rows", "formats"]) == 1
    assert "\x1b]0" not in capsys.readouterr().out


def wrong_calls(tmp_path, healthy):
    file = tmp_path / "file"
    file.write_text("")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    folder = str(healthy["llama"])
    return [
        ([], "required"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(file)], "is a file"),
        ([str(tmp_path)], "no config.json"),
        ([str(adapter)], "is an adapter"),
        (["somebody/model"], "neither a folder here nor a model that the Hub gives us"),
        ([folder, "--rows", "paddling"], "row 'paddling' is unknown"),
        ([folder, "--quick", "--deep"], "exclude each other"),
        ([folder, "--json", str(tmp_path / "no" / "report.json")], "does not exist"),
        ([folder, "--quik"], "--quik"),
    ]


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path, healthy, capsys):
    for argv, words in wrong_calls(tmp_path, healthy):
        assert main(["doctor", *argv]) == 2, argv
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("hf-decoder doctor: error: ") and words in lines[-1], lines
        assert not any("Traceback" in line for line in lines)


def test_levels_include_each_other_and_names_are_unique():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for check in CHECKS:
        assert check.level in LEVELS and check.claim and check.means and check.remedy
    with pytest.raises(ValueError, match="level 'thorough' is unknown"):
        run_doctor(".", level="thorough")

"""Intervals against their definition, anonymous pairs, and judgments that survive a restart."""

import json
import math

import pytest

from hf_decoder.evaluation.blind_comparison import (
    Z95,
    JudgmentFile,
    Pair,
    Tally,
    blind_pairs,
    judgments_needed,
    wilson_interval,
)

NAMES = ("one", "two")
PROMPTS = [f"prompt {n} <b>&" for n in range(20)]
A, B = [f"from one {n}" for n in range(20)], [f"from two {n} </pre><script>" for n in range(20)]


@pytest.mark.parametrize("wins, count", [(0, 5), (3, 7), (50, 100), (99, 100), (4, 4)])
def test_wilson_interval_solves_the_score_equation(wins, count):
    # the shares p at which |wins/count - p| is exactly z standard errors, found by bisection
    def too_far(p: float) -> bool:
        return abs(wins / count - p) > Z95 * math.sqrt(p * (1 - p) / count)

    def edge(outside: float, inside: float) -> float:
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if too_far(middle) else (outside, middle)
        return inside

    low, high = wilson_interval(wins, count)
    assert low == pytest.approx(edge(0.0, wins / count) if wins else 0.0, abs=1e-9)
    assert high == pytest.approx(edge(1.0, wins / count) if wins < count else 1.0, abs=1e-9)


def test_no_judgment_tells_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert judgments_needed(0, 0) is None and judgments_needed(3, 6) is None


@pytest.mark.parametrize("wins, count", [(3, 5), (6, 10), (2, 10), (11, 20)])
def test_judgments_needed_is_the_first_number_that_decides(wins, count):
    share, total = wins / count, count + judgments_needed(wins, count)

    def decides(number: int) -> bool:
        low, high = wilson_interval(share * number, number)
        return not low <= 0.5 <= high

    assert decides(total)
    assert total == count or not decides(total - 1)


def test_pairs_are_shuffled_and_balanced_and_repeatable():
    pairs = blind_pairs(PROMPTS, A, B, seed=1)
    assert sum(pair.left_is_a for pair in pairs) == 10
    assert [pair.prompt for pair in pairs] != PROMPTS
    assert sorted(pair.prompt for pair in pairs) == sorted(PROMPTS)
    for pair in pairs:
        assert ("from one" in pair.left) == pair.left_is_a
        assert pair.winner("left") == ("A" if pair.left_is_a else "B") != pair.winner("right")
    assert blind_pairs(PROMPTS, A, B, seed=1) == pairs != blind_pairs(PROMPTS, A, B, seed=2)
    assert blind_pairs(["a", "b", "b"], ["x", "y", "y"], ["x ", "z", "z"]) in ([Pair("b", "y", "z", True)], [Pair("b", "z", "y", False)])  # fmt: skip # noqa: E501


def test_judgments_survive_an_interrupt_in_the_middle_of_a_line(tmp_path):
    pairs = blind_pairs(PROMPTS, A, B)
    path = tmp_path / "judgments.jsonl"
    file = JudgmentFile(path, NAMES)
    for pair in pairs[:5]:
        assert file.add(pair, "left")
    assert not file.add(pairs[0], "right")  # once only
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "abc", "winn')
    again = JudgmentFile(path, NAMES)
    assert path.read_bytes() == whole
    assert again.remaining(pairs) == pairs[5:]
    again.add(pairs[5], "tie")
    for line in path.read_text("utf-8").splitlines():
        json.loads(line)
    wins_a = sum(pair.left_is_a for pair in pairs[:5])
    assert JudgmentFile(path, NAMES).tally(pairs) == again.tally(pairs) == Tally(wins_a, 5 - wins_a, 1, lefts=5)


def test_undo_takes_back_what_was_judged_since_the_start(tmp_path):
    pairs = blind_pairs(PROMPTS, A, B)
    path = tmp_path / "judgments.jsonl"
    JudgmentFile(path, NAMES).add(pairs[0], "left")
    before = path.read_bytes()
    file = JudgmentFile(path, NAMES)
    assert file.undo() is None and not file.can_undo  # of an earlier session
    file.add(pairs[1], "left", note="a note")
    file.add(pairs[2], "both_bad")
    assert json.loads(path.read_text("utf-8").splitlines()[1])["note"] == "a note"
    assert file.tally(pairs).results()["both_bad"] == 1 and file.tally(pairs).decided == 2
    assert file.undo() == pairs[2] and file.undo() == pairs[1] and file.undo() is None
    assert path.read_bytes() == before and file.remaining(pairs) == pairs[1:]
    assert file.tally(pairs) == JudgmentFile(path, NAMES).tally(pairs)


def test_judgments_of_others_are_refused(tmp_path):
    path = tmp_path / "judgments.jsonl"
    JudgmentFile(path, NAMES).add(blind_pairs(PROMPTS, A, B)[0], "tie")
    with pytest.raises(ValueError, match="of one and two, not of one and three"):
        JudgmentFile(path, ("one", "three"))
    path.write_text("hello\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not a judgment"):
        JudgmentFile(path, NAMES)


def test_only_judgments_of_the_pairs_shown_count(tmp_path):
    file = JudgmentFile(tmp_path / "judgments.jsonl", NAMES)
    before, now = blind_pairs(PROMPTS, A, B), blind_pairs(PROMPTS, A, [*B[:10], *A[:10]])
    for pair in before:
        file.add(pair, "left" if pair.left_is_a else "right")
    shared = [pair for pair in now if pair.key in {one.key for one in before}]
    assert 0 < len(shared) < len(now)
    assert file.tally(before).wins_a == 20 and file.tally(now).decided == file.tally(now).wins_a == len(shared)
    assert file.tally(now).lefts == sum(pair.left_is_a for pair in before if pair.key in {one.key for one in shared})


def test_no_line_without_its_end_is_lost(tmp_path):
    path, pairs = tmp_path / "judgments.jsonl", blind_pairs(PROMPTS, A, B)
    JudgmentFile(path, NAMES).add(pairs[0], "tie")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # as some editors leave it
    assert JudgmentFile(path, NAMES).remaining(pairs) == pairs[1:] and path.read_bytes() == whole
    for others in (whole.replace(b'"two"', b'"three"')[:-1], b"a note of mine"):
        path.write_bytes(others)
        with pytest.raises(ValueError, match="name another --output_dir"):
            JudgmentFile(path, NAMES)
        assert path.read_bytes() == others


def test_the_words_of_a_result():
    assert "excludes 50%: one is preferred" in Tally(60, 20, 3).lines(NAMES)[2]
    assert "excludes 50%: two is preferred" in Tally(20, 60, 3).lines(NAMES)[2]
    assert "more decided judgments" in Tally(6, 4, 0).lines(NAMES)[2]
    assert Tally(0, 0, 2).results()["win_rate_a"] is None

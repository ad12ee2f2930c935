"""What is told of a run's rows before they are read."""

from hf_decoder.training.run_rows import StreamReport


def test_a_streamed_text_is_counted_by_its_bytes():
    report = StreamReport(bytes=1000, bytes_per_token=4.0, block_size=11)
    assert (report.tokens, report.blocks) == (250, 25)  # a token of each block is the first of the next one
    assert [line.split("about ")[-1].strip() for line in report.lines()] == ["1,000", "250", report.lines()[2], "25"]
    assert report.lines()[2].split()[-1] == "4.000"


def test_of_a_text_without_a_size_only_the_sample_is_known():
    report = StreamReport(bytes=None, bytes_per_token=4.0, block_size=11)
    assert report.tokens is None and report.blocks is None
    assert sum("not known" in line for line in report.lines()) == 3

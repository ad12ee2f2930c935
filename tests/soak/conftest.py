"""Collects the figures of the long tests and prints them at the end of the run."""

import pytest

FIGURES: list[str] = []


@pytest.fixture
def figures():
    """Adds a line to what `pytest -m soak` prints at its end."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("soak figures")
        for line in FIGURES:
            terminalreporter.write_line(line)

"""The bar shows on a terminal and nowhere else."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from fxprune.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_silent_when_piped(capfd: pytest.CaptureFixture[str]) -> None:
    with track("work", total=2) as tracker:
        tracker.advance(loss=1.0)
    assert capfd.readouterr() == ("", "")


def test_silent_when_not_enabled(terminal: Terminal) -> None:
    with redirect_stderr(terminal), track("work", total=2, enabled=False) as tracker:
        tracker.advance(loss=1.0)
    assert terminal.getvalue() == ""


def test_a_terminal_shows_description_count_and_values(terminal: Terminal) -> None:
    with redirect_stderr(terminal), track("work [a]", total=4, done=1) as tracker:
        tracker.advance(loss=0.25, metric=3)
    shown = terminal.getvalue()
    for text in ("work [a]", "2/4", "loss 0.25", "metric 3"):
        assert text in shown


def test_an_unknown_total_is_shown_as_such(terminal: Terminal) -> None:
    with redirect_stderr(terminal), track("work") as tracker:
        tracker.advance()
    assert "1/?" in terminal.getvalue()


def test_work_inside_work_shares_the_display(terminal: Terminal) -> None:
    with redirect_stderr(terminal), track("search", total=2) as outer:
        with track("fine-tune", total=3) as inner:
            inner.advance()
            outer.advance()
        outer.advance()
    shown = terminal.getvalue()
    assert "search" in shown
    assert "fine-tune" in shown


def test_output_into_a_pipe_stays_there(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with redirect_stderr(terminal), track("work", total=1):
        print("result")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in terminal.getvalue()

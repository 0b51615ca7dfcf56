"""What is shown while a model is fetched."""

from __future__ import annotations

import io

import pytest

from firesteel.fetching import shown_on_stderr


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["dumb", "xterm-256color"])
def test_where_nothing_has_to_be_fetched_a_terminal_shows_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a dumb one, which cannot take a bar away again, there was an empty line."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("sys.stderr", terminal)
    with shown_on_stderr("some-model"):
        pass
    assert terminal.getvalue() == ""


def test_a_terminal_shows_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr", terminal)
    with shown_on_stderr("some-model") as progress:
        progress("reading", 1, 2)
    assert "some-model: reading" in terminal.getvalue()

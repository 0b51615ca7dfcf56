"""What a run shows: on a terminal of some width, through a real one, and where nobody watches."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from training.utils.progress import BAR_CELLS, Bar, Display, Stage, Watched

NOTE = "step 3/12  dpo_loss 0.6931  margin +0.000  accuracy 0.500"
BAR = "━╸╺"


def watched(note: str = NOTE, done: int = 6, total: int = 24) -> Watched:
    bar = Bar(Stage("training", total), say=None)
    bar.advance(done, 4000, note)
    return Watched(bar)


def screen(view: Watched, width: int) -> list[str]:
    """Its lines as a terminal of this width shows them."""
    file = StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(view, end="")
    return file.getvalue().splitlines()


@settings(deadline=None, max_examples=40)
@given(st.integers(24, 200))
def test_nothing_is_lost_or_broken_at_any_width(width: int) -> None:
    view = watched()
    lines = screen(view, width)
    assert max(map(cell_len, lines)) <= width
    rates = view.parts()[-2:]  # of another moment
    for part in view.parts()[:-2]:
        if "left" not in part:
            assert any(part in line for line in lines), f"{part} is broken at {width}"
    assert all(any(rate.split(" ")[1] in line for line in lines) for rate in rates)
    assert sum(letter in BAR for line in lines for letter in line) == BAR_CELLS * 6 / 24


def test_on_a_wide_screen_it_is_one_line_and_on_one_of_40_columns_a_few() -> None:
    assert len(screen(watched(), 200)) == 1
    assert screen(watched(), 40)[0].startswith("training  ━━━━━━")
    assert 3 <= len(screen(watched(), 40)) <= 6


def test_a_part_that_is_wider_than_the_screen_goes_on_in_the_next_line() -> None:
    name = "a_metric_with_a_very_long_name 0.123456"
    lines = screen(watched(note=name), 16)
    assert max(map(cell_len, lines)) <= 16
    assert name in "".join(lines)


def test_before_anything_is_done_nothing_is_made_up() -> None:
    lines = screen(Watched(Bar(Stage("reference", 24), say=None)), 80)
    assert "0/24" in lines[0]
    assert "left" not in lines[0]


def test_where_nobody_watches_a_line_has_the_same_numbers() -> None:
    said: list[str] = []
    bar = Bar(Stage("training", 24), said.append)
    bar.advance(6, 4000, NOTE)
    bar.advance(6)
    assert said[0].startswith(f"{NOTE}  ")
    assert re.search(r"pairs/s · [\d,]+ tokens/s  \d+ s left$", said[0])
    assert said[1].startswith("training 12/24  ")


def test_a_line_that_is_to_be_said_once_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    for line in ("one", "two", "one"):
        display.say_once(line)
    assert capsys.readouterr().out.splitlines() == ["one", "two"]


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs import config
from training.recipes.dpo_loop import main

main(config(Path(sys.argv[2]), count=12, eval_fraction=0.3, eval_interval=4, epochs=2))
"""


def in_a_terminal(columns: int, *arguments: str) -> str:
    """What a program writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment
    )
    os.close(slave)
    written = b""
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:  # on Linux, the end of what a terminal's other side has written
            break
        if not read:
            break
        written += read
    os.close(master)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return written.decode()


@pytest.mark.slow
def test_a_run_in_a_terminal_of_40_columns_shows_its_numbers_beside_the_bar(tmp_path: Path) -> None:
    written = in_a_terminal(40, PROGRAM, str(Path(__file__).parent), str(tmp_path))
    rows = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", row) for row in re.split(r"[\r\n]+", written)]
    whole = re.compile(
        r"(dpo_loss \d\.\d{4}|margin [+-]\d+\.\d{3}|accuracy \d\.\d{3}|step 8/8|16/16|[\d,.]+ tokens/s)"
    )
    drawn = [row for row in rows if any(letter in BAR for letter in row)]
    beside = [row for row in rows if row not in drawn and whole.search(row) and "held out" not in row]
    assert drawn
    assert {part.split(" ")[0] for row in beside for part in whole.findall(row)} >= {
        "dpo_loss",
        "margin",
        "accuracy",
    }
    assert max(cell_len(row) for row in [*drawn, *(row for row in beside if "trained" not in row)]) <= 40
    # What stays on the screen is the lines of text; the bar has gone.
    assert any(row.startswith("held out after step 8") for row in rows)
    assert any(row.startswith("trained: 8 steps, 16 pairs") for row in rows)
    assert not any(letter in BAR for letter in rows[-3])

"""Previews of rows on a terminal, or as plain text: where tokens end, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from training.utils.data_preview import Preview, ShownPart

# Colours that can be read on dark and on light; what is not scored is dim.
_SCORED = {
    "chosen": "bold green",
    "answer 1": "bold green",
    "the example": "bold green",
    "rejected": "bold red",
}
_OTHER = "bold magenta"
_OPEN, _CLOSE, _BORDER = "⟦", "⟧", "│"
_SMALL_DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def print_previews(found: Iterable[Preview], *, borders: bool) -> None:
    """In colours on a terminal that has them, every second token underlined; elsewhere with scored tokens in brackets.

    There tokens run together unless `borders` are asked for: with a mark behind every word a text is hard to read.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    console.print(_legend(coloured, borders), markup=False)
    for row in found:
        console.print(f"\n{row.path}:{row.line}: {row.problem or row.form}", markup=False)
        for part in row.parts:
            text = _heading(part)
            (_add_coloured if coloured else _add_plain)(text, part, borders)
            if part.cut:
                text.append(f"  ✂ cut here: {part.cut:,} tokens do not fit")
            console.print(text)


def _legend(coloured: bool, borders: bool) -> str:
    scored = (
        "scored tokens are bold and coloured, every second token is underlined"
        if coloured
        else f"scored tokens stand in {_OPEN}{_CLOSE}"
    )
    between = f"; {_BORDER} stands between tokens, {_small(3)} behind what takes 3 of them" if borders else ""
    return f"{scored}{between}; ↵ is a line break"


def _heading(part: ShownPart) -> Text:
    from rich.text import Text

    together = sum(each.tokens for each in part.texts if each.tokens > 1)
    parts = f", {together:,} only parts of a character" if together else ""
    return Text(f"  {part.name}, {len(part.tokens):,} tokens, {part.scored:,} scored{parts}: ")


def _add_coloured(text: Text, part: ShownPart, borders: bool) -> None:
    underlined = False
    for place, each in enumerate(part.texts):
        if borders and place:
            text.append(_BORDER, "dim")
        colour = _SCORED.get(part.name, _OTHER) if each.scored else "dim"
        text.append(_visible(each.text), f"{colour} underline" if underlined else colour)
        text.append(_count(each.tokens) if borders else "", "dim")
        underlined ^= bool(each.text)  # those beside a token without a text differ too


def _add_plain(text: Text, part: ShownPart, borders: bool) -> None:
    runs = []
    for scored, run in groupby(part.texts, key=lambda each: each.scored):
        shown = (_visible(each.text) + (_count(each.tokens) if borders else "") for each in run)
        joined = (_BORDER if borders else "").join(shown)
        runs.append(f"{_OPEN}{joined}{_CLOSE}" if scored else joined)
    text.append("".join(runs))


def _count(tokens: int) -> str:
    return _small(tokens) if tokens > 1 else ""


def _small(number: int) -> str:
    return str(number).translate(_SMALL_DIGITS)


def _visible(text: str) -> str:
    """Line breaks marked, and whatever else is no letter as its code: a terminal obeys some of those."""
    return "".join(
        "↵\n" if letter == "\n" else letter if letter.isprintable() else f"\\u{ord(letter):04x}"
        for letter in text
    )

"""What a report says, read out of its HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

# What is shown without a closing tag.
VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Reading(HTMLParser):
    """All elements, and all that is text."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By caption: for each row its name and its cells."""
    open: list[str] = field(default_factory=list)
    _caption: str = ""
    _row: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = []
        if tag == "caption":
            self._caption = ""
        if tag in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are closed in the order in which they were opened"
        if tag == "tr" and len(self._row) > 1:
            self.tables.setdefault(self._caption, {})[self._row[0]] = self._row[1:]
        if tag == "table":
            self._caption = ""

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] == "caption":
            self._caption += data
        if self.open and self.open[-1] in ("td", "th"):
            self._row[-1] += data

    @property
    def text(self) -> str:
        """All of it, in order."""
        return "".join(self.texts)

    @property
    def told(self) -> list[str]:
        """What each chart is for whoever cannot see it."""
        return [str(a["aria-label"]) for _, a in self.tags if a.get("role") == "img"]


def read_page(path: Path) -> Reading:
    """Raises AssertionError for elements that overlap."""
    reading = Reading()
    reading.feed(path.read_text())
    reading.close()
    assert reading.open == []
    return reading

"""What a look at the machine, the installation or a config has found: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FindingLevel = Literal["ok", "note", "problem"]
"""`note` is worth knowing; with a `problem` a run would stop."""


@dataclass(frozen=True)
class Finding:
    """One line of `firesteel doctor`."""

    section: str
    subject: str
    says: str
    verdict: FindingLevel = "ok"
    todo: str | None = None
    """How to mend it: a command where there is one."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers in it, for scripts."""


def size(count: float) -> str:
    """Bytes for people: `5.1 GB`."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"

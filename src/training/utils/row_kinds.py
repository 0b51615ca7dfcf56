"""The kinds of rows that there are, by name: a process that checks rows is told which."""

from __future__ import annotations

from typing import Any

from training.utils.preference_rows import PREFERENCES
from training.utils.row_check import RowKind
from training.utils.sft_rows import SFT

KINDS: dict[str, RowKind[Any]] = {kind.name: kind for kind in (PREFERENCES, SFT)}

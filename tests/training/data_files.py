"""Small files of preferences, and what the data check says of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.utils.data_check import Check, FileReport
from training.utils.data_findings import DataFinding
from training.utils.rendering import Renderer
from training.utils.row_kinds import kind_of
from training.utils.row_outcomes import Rendering


def pair(prompt: str, chosen: str, rejected: str, **fields: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": prompt}
    said = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
    return {"prompt": [asked], "chosen": said[:1], "rejected": said[1:], **fields}


def distinct(count: int) -> list[dict[str, Any]]:
    """Pairs with nothing to find: of either side, as often the longer one."""
    answers = [("yes", "no"), ("no", "yes")]
    return [pair(f"Question {number}?", *answers[number % 2]) for number in range(count)]


def write(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def check(path: str, renderer: Renderer | None, **rules: Any) -> FileReport:
    (report,) = Check(renderer, kind_of([path]), Rendering(**rules)).files([path])
    return report


def found(report: FileReport) -> dict[str, DataFinding]:
    return {finding.name: finding for finding in report.findings}

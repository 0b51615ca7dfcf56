"""Chance, and the table of what was tried."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from fault_record import table


@pytest.fixture
def chance() -> random.Random:
    """Another for each run of the tests; the seed is printed where one fails."""
    seed = int(os.environ.get("FIRESTEEL_FAULT_SEED", random.randrange(2**32)))
    print(f"FIRESTEEL_FAULT_SEED={seed}")
    return random.Random(seed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Print the table, and write it where FIRESTEEL_FAULT_TABLE says."""
    if text := table():
        print(f"\n{text}")
        if path := os.environ.get("FIRESTEEL_FAULT_TABLE"):
            Path(path).write_text(text)

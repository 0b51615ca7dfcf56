"""`firesteel cache`, beside real runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from runs import config
from typer.testing import CliRunner

from firesteel.cli.main import app
from firesteel.sdk import ConfigError
from training.recipes.dpo_loop import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home that a run has used."""
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    main(config(tmp_path))
    return tmp_path / "home"


def firesteel(*arguments: object) -> str:
    """What it prints; its errors are raised."""
    given = ["cache", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def listed() -> list[str]:
    return [entry["kind"] for entry in json.loads(firesteel("list", "--json"))["entries"]]


def test_the_list_shows_caches_and_what_is_none(home: Path) -> None:
    lines = firesteel("list").splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["CACHE", "references", "rows", "-"]
    assert "12 answers' log-probabilities" in lines[1]
    assert "6 rows, 0 refused" in lines[2]
    assert f"{home}/models: models: `firesteel models list`" in lines[3]


def test_only_what_is_named_is_cleared(home: Path) -> None:
    cleared = json.loads(firesteel("clear", "rows", "--yes", "--json"))
    assert [each["entry"]["kind"] for each in cleared["cleared"]] == ["rows"]
    assert cleared["freed"] > 0
    assert listed() == ["references"]
    with pytest.raises(ConfigError, match="models: no cache of that name; there is references, rows"):
        firesteel("clear", "models", "--yes")


def test_all_caches_are_cleared_and_models_stay(home: Path) -> None:
    assert "cleared" in firesteel("clear", "--yes")
    assert listed() == ["references"]  # the file, without an entry
    assert list((home / "models").glob("tiny-llama-*"))


def test_only_what_is_old_enough_is_cleared_and_the_rest_is_counted(home: Path) -> None:
    (index,) = (home / "row_indexes").iterdir()
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(index, (days_ago, days_ago))
    assert "1 were written since, and stay" in firesteel("clear", "--older-than", 2, "--yes")
    assert listed() == ["references"]


def test_nothing_is_cleared_before_the_answer(home: Path) -> None:
    result = CliRunner().invoke(app, ["cache", "clear"], input="n\n")
    assert result.exit_code == 1
    assert "clear 1 references, 1 rows, " in result.output
    assert listed() == ["references", "rows"]

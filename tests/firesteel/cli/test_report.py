"""`firesteel report`, on a real run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import config
from typer.testing import CliRunner

from firesteel.cli.main import app
from firesteel.sdk import CheckpointError
from training.recipes.dpo_loop import main


def report(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_it_writes_the_page_and_prints_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        main(config(tmp_path / name))
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    assert report(one) == str(one / "report.html")
    assert report(one, "--to", tmp_path / "there.html") == str(tmp_path / "there.html")
    monkeypatch.chdir(tmp_path)
    assert report(one, two) == "report.html"  # in the current folder, in neither run
    assert "2 runs" in (tmp_path / "report.html").read_text()
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        report(tmp_path)


def test_the_chart_library_is_loaded_when_a_report_is_written_and_not_before() -> None:
    code = (
        "import sys, firesteel.cli.main, training.utils.report, training.recipes.dpo_loop\n"
        "print(*sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout.strip()) == (0, ""), outcome.stderr

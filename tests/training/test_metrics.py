from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.utils import metrics
from training.utils.config import WandBConfig
from training.utils.metrics import MetricsLog


def test_each_record_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", WandBConfig(), {})
    log.log(1, {"train/dpo_loss": 0.5})
    log.log(2, {"train/dpo_loss": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"train/step": 1, "train/dpo_loss": 0.5}, {"train/step": 2, "train/dpo_loss": None}]
    log.close()


def test_a_missing_wandb_is_one_warning_that_names_the_extra(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one thing that differs between machines is whether the package can be found.
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    log = MetricsLog(tmp_path / "metrics.jsonl", WandBConfig(project="p"), {})
    log.log(1, {"train/margin": 1.0})
    log.close()
    assert [record.message for record in caplog.records] == [
        "wandb is configured but not installed (pip install 'firesteel[wandb]'); going on without"
    ]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1

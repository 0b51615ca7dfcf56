"""Weights & Biases, the real package, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.utils.config import WandBConfig
from training.utils.sinks import MetricsLog
from training.utils.trackers import TrackedRun, WandBSink

pytestmark = pytest.mark.slow


def test_a_run_without_a_key_is_written_offline_beside_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    run = TrackedRun(tmp_path, {"beta": 0.1})
    wandb = WandBSink(run, WandBConfig(project="dpo", run_name="first"))
    log = MetricsLog(tmp_path / "metrics.jsonl", [wandb])
    for step in (1, 2, 3):
        log.log(step, {"train/margin": float(step)})
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.utils.sinks import MetricsLog, logged


class ListSink:
    """Keeps what it is given; may fail to close."""

    def __init__(self, fails: bool = False) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self._fails = fails

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.records.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True
        if self._fails:
            raise OSError("no room")


def test_each_record_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"train/dpo_loss": 0.5})
    log.log(2, {"train/dpo_loss": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"train/step": 1, "train/dpo_loss": 0.5}, {"train/step": 2, "train/dpo_loss": None}]
    log.close()


def test_what_was_logged_is_read_back_but_for_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log(1, {"train/margin": 0.25})
    log.close()
    with path.open("a") as file:
        file.write('{"train/step": 2, "train/mar')
    assert list(logged(path)) == [{"train/step": 1, "train/margin": 0.25}]


def test_every_tracker_is_given_every_record(tmp_path: Path) -> None:
    trackers = [ListSink(), ListSink()]
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers)
    log.log(3, {"train/margin": 1.0})
    log.close()
    assert [tracker.records for tracker in trackers] == [[(3, {"train/margin": 1.0})]] * 2


def test_a_tracker_that_cannot_finish_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    trackers = [ListSink(), ListSink(fails=True), ListSink()]
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers)
    with pytest.raises(OSError, match="no room"):
        log.close()
    assert all(tracker.closed for tracker in trackers)

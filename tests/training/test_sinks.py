from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from firesteel.sdk import StorageError
from training.utils.sinks import MetricsLog, logged


class ListSink:
    """Keeps what it is given; may fail at a step, or to close."""

    def __init__(self, fails: str = "", at_step: int = 0) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self._fails, self._at_step = fails, at_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._at_step:
            raise LookupError(self._fails)
        self.records.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1
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


def test_a_tracker_that_cannot_finish_is_told_of_and_keeps_no_other_from_it(tmp_path: Path) -> None:
    trackers, said = [ListSink(), ListSink(fails="always"), ListSink()], list[str]()
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers, said.append)
    log.close()
    assert [tracker.closed for tracker in trackers] == [1, 1, 1]
    (warning,) = said
    assert "closing it: tracker ListSink failed: OSError: no room" in warning


def test_a_tracker_that_fails_is_closed_and_told_nothing_more(tmp_path: Path) -> None:
    broken, sound, said = ListSink(fails="the server is gone", at_step=2), ListSink(), list[str]()
    log = MetricsLog(tmp_path / "metrics.jsonl", [broken, sound], said.append)
    for step in (1, 2, 3):
        log.log(step, {"train/margin": 0.5})
    log.close()
    assert [step for step, _ in broken.records] == [1]
    assert broken.closed == 1
    assert [step for step, _ in sound.records] == [1, 2, 3]
    assert [record["train/step"] for record in logged(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    first, second = said
    assert "step 2: tracker ListSink failed: LookupError: the server is gone" in first
    assert "metrics.jsonl has all numbers" in first
    assert "closing it" in second


def test_an_interrupt_while_a_tracker_is_told_is_no_failure_of_it(tmp_path: Path) -> None:
    class Interrupted(ListSink):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    log = MetricsLog(tmp_path / "metrics.jsonl", [Interrupted()], pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        log.log(1, {"train/margin": 0.5})


def test_trackers_are_closed_where_the_metrics_cannot_be_written(tmp_path: Path) -> None:
    tracker = ListSink()
    with pytest.raises(StorageError):
        MetricsLog(tmp_path / "no such folder" / "metrics.jsonl", [tracker])
    assert tracker.closed == 1

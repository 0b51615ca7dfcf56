"""What evaluations leave of each held-out row. That a killed run ends with the same bits of it: `test_resume`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import config, numbers, write_rows

from training.recipes.dpo_loop import main
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, heldout_steps, read_heldout, write_heldout
from training.utils.report import write_report


def test_what_is_written_is_read_and_a_value_that_is_no_number_stays_none(tmp_path: Path) -> None:
    rows = [
        HeldoutRow(3, -1.5, {"chosen": 4, "rejected": 5}, 2, {"chosen": -3.25, "rejected": -7.0}),
        HeldoutRow(9, math.inf, {"chosen": 1, "rejected": 2}),
    ]
    write_heldout(tmp_path, 0, HeldoutRows("margin", rows))
    read = read_heldout(tmp_path, 0)
    assert read is not None
    assert (read.measure, read.rows[0]) == ("margin", rows[0])
    assert math.isnan(read.rows[1].value)


def test_the_first_and_the_newest_evaluation_are_kept(tmp_path: Path) -> None:
    for step in (0, 5, 10, 15):
        write_heldout(tmp_path, step, HeldoutRows("margin", [HeldoutRow(1, step, {"chosen": 1})]))
    assert heldout_steps(tmp_path) == [0, 15]
    newest = read_heldout(tmp_path, 15)
    assert newest is not None
    assert newest.rows[0].value == 15


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b'{"line": "x", "margin": 1}\n', b"\xff\n"])
def test_what_is_not_as_it_was_written_is_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout/step-0.jsonl").write_bytes(content)
    (tmp_path / "heldout/step-x.jsonl").write_bytes(content)
    assert heldout_steps(tmp_path) == [0]
    assert read_heldout(tmp_path, 0) is None


def test_a_run_leaves_the_margin_of_each_held_out_pair_by_its_line(tmp_path: Path) -> None:
    main(config(tmp_path, count=12, eval_fraction=0.3, eval_interval=1))
    assert heldout_steps(tmp_path / "run") == [0, 4]
    before, after = (read_heldout(tmp_path / "run", step) for step in (0, 4))
    assert before is not None
    assert after is not None
    assert {row.value for row in before.rows} == {0.0}
    assert [row.line for row in before.rows] == [row.line for row in after.rows]
    last = numbers(tmp_path / "run")[-1]
    assert sum(row.value for row in after.rows) / 4 == pytest.approx(last["eval/margin"], abs=1e-5)
    assert all(row.tokens["rejected"] > row.tokens["chosen"] > 0 for row in after.rows)


def test_going_on_with_other_held_out_rows_sets_those_of_before_aside(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"held-{n}.jsonl", 3 + n, start=50 * n) for n in (1, 2))
    main(config(tmp_path, dcp_save_interval=1, eval_dataset=one))
    main(config(tmp_path, dcp_save_interval=1, eval_dataset=two, epochs=2))
    assert heldout_steps(tmp_path / "run") == [6]
    assert heldout_steps(tmp_path / "run/previous-1") == [0, 3]
    (tmp_path / "run/summary.json").unlink()  # what a run says that is not finished
    assert "(before: not known)" in write_report([tmp_path / "run"]).read_text()

"""A large file is read with little memory (a million rows: `benchmarks/scaling.py --part rows --most-rows 1000000`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.utils import row_index

pytestmark = pytest.mark.slow

ROWS = 100_000

READ = """
import json, sys
from contextlib import closing
from pathlib import Path
from training.utils.evaluation import split_by_prompt
from training.utils.row_sets import select_rows
from training.utils.rendering import Renderer
from training.utils.preference_rows import PREFERENCES
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.schedules import Epochs

def resident(which):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if which in l)
    return int(line.split()[1]) / 1024

renderer = Renderer.load("tiny-llama")
assert renderer.identity
before = resident("VmRSS")
index = index_rows(sys.argv[1], renderer, PREFERENCES, "skip")
with closing(select_rows(index, renderer, Rendering(200))) as selected:
    split = split_by_prompt(selected.rows, 0.1, seed=0)
    epochs = Epochs(len(split.train), 8, epochs=1, seed=0, shuffle=True)
    lines = set()
    batches = (batch.rows for batch, _ in zip(epochs.batches(), range(50)))
    for taken in split.train.taken_ahead(batches):
        lines |= {pair.line for pair in taken.items}
    counts = [len(index.rows), index.refused_count, len(split.heldout), sum(1 for _ in selected.outcomes())]
print(json.dumps([*counts, len(lines), max(lines) - min(lines), resident("VmHWM") - before]))
"""


def test_memory_grows_by_little_more_than_the_index(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            answer = "x" * 300 if number % 1000 == 7 else f"{number + 1}"  # some are too long
            asked = f"Question {number} of very many: what comes after it?"
            row = {"chosen": f"{asked} {answer}", "rejected": f"{asked} who knows"}
            file.write("no json\n" if number % 1000 == 3 else json.dumps(row) + "\n")
    ran = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    usable, refused, heldout, lost, seen, spread, grown = json.loads(ran.stdout)
    assert (usable, refused, lost) == (ROWS - 100, 100, 200)
    assert heldout == pytest.approx(0.1 * (ROWS - 200), abs=1)
    assert seen == 400
    assert spread > 0.9 * ROWS  # one shuffle of the whole file, not of a window
    assert path.stat().st_size > row_index.BYTES_WORTH_WORKERS  # by worker processes, as large files are
    # The rows take 17 MB, their index 6.4; a million may take 200.
    assert grown < 40

"""Rows that are indexed and rendered when their turn comes give the pairs that reading all into memory gives."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import QWEN_3, byte_tokenizer

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.sdk.errors import ConfigError, DataError, ModelError, OperationFailed, RowError
from training.utils import row_index
from training.utils.pairs import PreferencePair, RenderedPairs, render_pairs
from training.utils.preference_data import read_preferences
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import RowSet, SelectedRows, select_rows
from training.utils.row_workers import RowWorkers
from training.utils.sft_rows import SFT


def row(chosen: str, rejected: str, question: str = "Ask") -> dict[str, Any]:
    user = {"role": "user", "content": question}
    return {
        name: {"messages": [user, {"role": "assistant", "content": answer}]}
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    }


def write(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(byte_tokenizer())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def same(one: PreferencePair, other: PreferencePair) -> bool:
    beside = [(pair.prompt_len, pair.line, pair.weight, pair.source, pair.truncated) for pair in (one, other)]
    return beside[0] == beside[1] and all(
        a.model_input.to_ints() == b.model_input.to_ints()
        and all(
            (a.loss_fn_inputs[k].to_numpy() == b.loss_fn_inputs[k].to_numpy()).all() for k in a.loss_fn_inputs
        )
        for a, b in zip(one.datums, other.datums, strict=True)
    )


def all_of(pairs: RowSet[PreferencePair]) -> list[PreferencePair]:
    return pairs.take(range(len(pairs)))


# Good, identical, ending a turn inside, empty, and not JSON; few answers, so that cut ones become the same.
answers = st.sampled_from(["a", "b", "same at first", "same", "long answer", "<|im_end|>", ""])
rows = st.one_of(st.builds(row, answers, answers), st.just("not json"), st.just(""))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(rows, min_size=1, max_size=9),
    st.sampled_from([None, 20, 26, 30]),
    st.sampled_from(["drop", "response_end"]),
    st.sampled_from([None, 1, 2]),
)
def test_pairs_outcomes_and_summary_are_those_of_reading_all_into_memory(
    tmp_path: Path, renderer: Renderer, rows: list[Any], limit: int | None, truncate: Any, most: int | None
) -> None:
    path, rules = write(tmp_path, *rows), Rendering(limit, truncate, "skip")

    def in_memory() -> RenderedPairs:
        return render_pairs(read_preferences(path, "skip"), renderer, rules, most)

    def indexed() -> SelectedRows[PreferencePair]:
        return select_rows(index_rows(path, renderer, PREFERENCES, "skip"), renderer, rules, most)

    try:
        expected = in_memory()
    except DataError:
        with pytest.raises(DataError):
            indexed()
        return
    with closing(indexed()) as found:
        assert len(found.rows) == len(expected.pairs)
        assert all(same(one, other) for one, other in zip(all_of(found.rows), expected.pairs, strict=True))
        if most is None:
            assert tuple(found.outcomes()) == expected.dropped
            assert found.summary == expected.summary
        else:  # the index knows of bad rows behind the last pair that is used, too
            assert set(expected.dropped) <= set(found.outcomes())


def test_errors_of_reading_and_of_rendering_are_told_together(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, row("a", "b"), row("a", "<|im_end|>"), "no json", row("a", "a"))
    with pytest.raises(
        DataError, match=r"3 rows cannot be used:\n.*:2: rejected.*\n.*:3: row.*\n.*:4: rejected"
    ):
        index_rows(path, renderer, PREFERENCES)
    with pytest.raises(RowError, match=r"pairs\.jsonl:2: rejected: the response contains"):
        index_rows(write(tmp_path, row("a", "b"), row("a", "<|im_end|>")), renderer, PREFERENCES)


def test_a_known_file_is_not_rendered_again_and_its_bad_rows_are_known_all_the_same(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, row("a", "b"), "no json")
    first = index_rows(path, renderer, PREFERENCES, "skip")

    def fail(*arguments: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(row_index, "check_rows", fail)
    again = index_rows(path, renderer, PREFERENCES, "skip")
    assert (again.rows == first.rows).all()
    assert list(again.refused()) == list(first.refused())
    with pytest.raises(RowError, match=r"pairs\.jsonl:2: row: not valid JSON"):
        index_rows(path, renderer, PREFERENCES, "fail")


def test_another_file_or_template_is_read_anew(tmp_path: Path, renderer: Renderer, home: Path) -> None:
    indexes = [
        index_rows(write(tmp_path, row("a", "b")), renderer, PREFERENCES),
        index_rows(write(tmp_path, row("a", "c")), renderer, PREFERENCES),
        index_rows(write(tmp_path, row("a", "b")), Renderer(byte_tokenizer(QWEN_3)), PREFERENCES),
        index_rows(write(tmp_path, row("a", "b"), name="copy.jsonl"), renderer, PREFERENCES),
    ]
    folders = [index.folder for index in indexes]
    assert len(set(folders[:3])) == 3
    assert folders[3] == folders[0]  # by content, whatever the name
    assert {path.name for path in (home / "row_indexes").iterdir()} == {folder.name for folder in folders}


@pytest.mark.parametrize("name", ["rows.npy", "ranked.npy", "refused.jsonl", "index.json"])
def test_a_damaged_index_is_made_again(tmp_path: Path, renderer: Renderer, name: str) -> None:
    path = write(tmp_path, row("a", "b"), row("c", "d"), "no json")
    index = index_rows(path, renderer, PREFERENCES, "skip")
    expected = np.array(index.rows)
    damaged = bytearray((index.folder / name).read_bytes())
    damaged[-3] ^= 1
    (index.folder / name).write_bytes(damaged)
    again = index_rows(path, renderer, PREFERENCES, "skip")
    assert (again.rows == expected).all()
    assert [bad.line for bad in again.refused()] == [3]
    assert not list(index.folder.parent.glob(".partial-*"))


def test_a_row_takes_64_bytes() -> None:
    assert PREFERENCES.record_type.itemsize == 64


def test_a_gzipped_file_is_read_by_place_like_a_plain_one(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps(row("a", "b")), "", row("c", "d"))
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    for name in (path, str(packed)):
        with closing(select_rows(index_rows(name, renderer, PREFERENCES), renderer, Rendering())) as selected:
            taken = selected.rows.take([1, 0])
            assert [pair.line for pair in taken] == [3, 1]


def test_a_file_that_is_replaced_is_still_read_as_it_was_and_a_changed_one_is_refused(
    tmp_path: Path, renderer: Renderer
) -> None:
    path = write(tmp_path, row("a", "b"), row("c", "d"))
    with closing(select_rows(index_rows(path, renderer, PREFERENCES), renderer, Rendering())) as selected:
        before = all_of(selected.rows)
        Path(write(tmp_path, row("x", "y"), name="other.jsonl")).rename(path)
        assert all(same(a, b) for a, b in zip(before, all_of(selected.rows), strict=True))
    with closing(select_rows(index_rows(path, renderer, PREFERENCES), renderer, Rendering())) as selected:
        with open(path, "a") as file:
            file.write(json.dumps(row("e", "f")) + "\n")
        with pytest.raises(DataError, match="was changed since its rows were checked"):
            selected.rows.take([0])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_a_file_that_is_replaced_between_check_and_training_is_refused(
    tmp_path: Path, renderer: Renderer, packed: bool
) -> None:
    paths = [
        write(tmp_path, row("a", "b"), name="one.jsonl"),
        write(tmp_path, row("c", "d"), name="two.jsonl"),
    ]
    if packed:
        for path in map(Path, paths):
            path.write_bytes(gzip.compress(path.read_bytes()))
    index = index_rows(paths[0], renderer, PREFERENCES)
    Path(paths[1]).rename(paths[0])  # rows of the same lengths, at the same places
    with pytest.raises(DataError, match="was changed since its rows were checked"):
        select_rows(index, renderer, Rendering())


DATED = "{{ strftime_now('%d %B %Y') }}\n" + str(byte_tokenizer().chat_template)


def test_a_template_that_prints_the_date_prints_that_of_the_start_all_along(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(DATED)
    days = [date(2026, 5, 9), date(2026, 11, 10)]  # of other lengths: 09 May 2026, 10 November 2026
    path = write(tmp_path, row("a", "b"))
    indexes, texts = [], []
    for today in days:
        renderer = Renderer(tokenizer, today=today)
        indexes.append(index_rows(path, renderer, PREFERENCES))
        with closing(select_rows(indexes[-1], renderer, Rendering())) as selected:
            texts.append(tokenizer.decode(selected.rows.take([0])[0].chosen.model_input.to_ints()))
    assert texts[0].startswith("09 May 2026")
    assert texts[1].startswith("10 November 2026")
    assert indexes[0].folder != indexes[1].folder
    assert Renderer(tokenizer, today=days[0]).identity != Renderer(tokenizer, today=days[1]).identity
    undated = byte_tokenizer()
    assert Renderer(undated, today=days[0]).identity == Renderer(undated, today=days[1]).identity


def test_batches_come_in_order_rendered_by_another_thread(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, *(row("a" * (1 + i), "b") for i in range(40)))
    with closing(select_rows(index_rows(path, renderer, PREFERENCES), renderer, Rendering())) as selected:
        batches = [tuple(np.random.default_rng(i).permutation(40)[:3].tolist()) for i in range(12)]
        threads = set()
        render = renderer.render
        renderer.render = lambda example: (threads.add(threading.current_thread()), render(example))[1]  # type: ignore[method-assign]
        taken = list(selected.rows.taken_ahead(batches))
    assert [[pair.line - 1 for pair in batch.items] for batch in taken] == [list(batch) for batch in batches]
    assert threads.isdisjoint({threading.current_thread()})
    assert all(batch.waited >= 0 for batch in taken)


def test_two_threads_may_take_pairs_of_one_file(tmp_path: Path, renderer: Renderer) -> None:
    """Rows to train on are rendered ahead while held-out ones of the same file are evaluated."""
    path = write(tmp_path, *(row("a" * (1 + i % 60), "b", f"Q{i}") for i in range(300)))
    with closing(select_rows(index_rows(path, renderer, PREFERENCES), renderer, Rendering())) as selected:
        numbers = [np.random.default_rng(seed).permutation(300).tolist() for seed in range(4)]
        with ThreadPoolExecutor(4) as threads:
            taken = list(threads.map(selected.rows.take, numbers))
    assert [[pair.line - 1 for pair in pairs] for pairs in taken] == numbers


def test_a_loop_that_stops_early_leaves_no_thread(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, *(row("a" * (1 + i), "b") for i in range(20)))
    with closing(select_rows(index_rows(path, renderer, PREFERENCES), renderer, Rendering())) as selected:
        taking = selected.rows.taken_ahead([(i,) for i in range(20)])
        next(taking)
        taking.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("rows")]


# Worker processes


@pytest.fixture
def catalogued() -> Renderer:
    return Renderer.load("tiny-llama")


@pytest.fixture
def workers_for_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "BYTES_WORTH_WORKERS", 0)
    monkeypatch.setattr(row_index, "CHUNK_ROWS", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        (
            PREFERENCES,
            {"prompt": "a", "completion": "b"},
            "holds supervised rows, and preferences are trained on here; train on these with `firesteel sft`",
        ),
        (
            SFT,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "holds preferences, and supervised rows are trained on here; train on these with `firesteel dpo` or "
            "`firesteel orpo`, or make supervised rows of them with `firesteel data convert --side chosen`",
        ),
    ],
    ids=["supervised rows", "preferences"],
)
def test_a_file_of_another_kind_is_one_error_with_what_to_do(
    tmp_path: Path, kind: Any, content: dict[str, str], text: str, on_bad_row: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(content) + "\n") * 30)
    with pytest.raises(DataError) as refused:
        index_rows(str(path), Renderer(byte_tokenizer()), kind, on_bad_row)
    assert str(refused.value) == f"{path}: {text}"


def test_rows_of_the_other_kind_among_those_that_are_wanted_are_told_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    other = {"prompt": "a", "completion": "b"}
    rows = [*[other] * 25, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"25 rows cannot be used:\n.*:1: row: .*a supervised row"):
        index_rows(str(path), Renderer(byte_tokenizer()), PREFERENCES)


def ranked(*answers: str, question: str) -> dict[str, Any]:
    return {"prompt": question, "completions": [*answers], "ranks": [*range(len(answers))]}


@pytest.mark.usefixtures("workers_for_every_file")
@pytest.mark.parametrize("lists", [False, True], ids=["pairs", "ranked lists"])
def test_workers_give_the_same_index(tmp_path: Path, catalogued: Renderer, home: Path, lists: bool) -> None:
    def one(number: int) -> Any:
        answers = ["a" * (1 + number % 5), *"bcd"[: 1 + number % 3]]
        return ranked(*answers, question=f"Q{number}") if lists else row(*answers[:2], f"Q{number}")

    given_rows = [one(i) if i % 7 else "no json" for i in range(40)]
    path = write(tmp_path, *given_rows)
    said: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "check_rows", None)  # this process checks nothing itself
        by_workers = index_rows(
            path, catalogued, PREFERENCES, "skip", lambda rows, offset: said.append((rows, offset))
        )
    assert said[-1][0] == 39
    home.rename(home.with_name("elsewhere"))
    alone = index_rows(
        path, Renderer(catalogued.tokenizer), PREFERENCES, "skip"
    )  # without a source: in this process
    folder = home.with_name("elsewhere") / "row_indexes" / by_workers.folder.name
    assert (np.load(folder / "rows.npy") == alone.rows).all()
    assert (np.load(folder / "ranked.npy") == alone.ranked).all()
    assert bool(len(alone.ranked)) == lists
    assert by_workers.refused_count == alone.refused_count == 6


@pytest.mark.usefixtures("workers_for_every_file")
def test_what_a_tokenizer_lacks_is_said_by_workers_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(store.fetch(load_catalog().resolve_model("tiny-llama")), folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        index_rows(write(tmp_path, row("a", "b")), Renderer.load(str(folder)), PREFERENCES)


def test_a_worker_that_dies_ends_the_reading_and_says_so(tmp_path: Path, catalogued: Renderer) -> None:
    chunks = list(row_index.row_chunks(write(tmp_path, row("a", "b")), lambda rows, offset: None))
    with closing(RowWorkers(catalogued, PREFERENCES, 1)) as workers:
        assert len(next(workers.check(chunks)).usable) == 1
        workers._workers[0]._process.send_signal(signal.SIGKILL)
        with pytest.raises(OperationFailed, match="exit code -9"):
            list(workers.check(chunks))


def test_a_killed_reading_leaves_nothing_that_is_taken_for_an_index(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path, *(row("a" * (1 + i % 50), "b", f"Q{i}") for i in range(4000)))
    script = (
        "from training.utils.rendering import Renderer; from training.utils.preference_rows import PREFERENCES\n"
        "from training.utils.row_index import index_rows\n"
        f"print('ready', flush=True); index_rows({path!r}, Renderer.load('tiny-llama'), PREFERENCES)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    until = time.monotonic() + 60
    while not list(home.glob("row_indexes/.partial-*/rows.raw")) and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not [p for p in (home / "row_indexes").iterdir() if not p.name.startswith(".")]
    assert len(index_rows(path, Renderer.load("tiny-llama"), PREFERENCES).rows) == 4000


def test_two_processes_that_index_one_file_at_once_both_have_the_index(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path, *(row("a" * (1 + i % 50), "b", f"Q{i}") for i in range(500)))
    script = (
        "import sys, time; from pathlib import Path\n"
        "from training.utils.rendering import Renderer; from training.utils.preference_rows import PREFERENCES\n"
        "from training.utils.row_index import index_rows\n"
        "renderer = Renderer.load('tiny-llama'); renderer.identity; print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"print(len(index_rows({path!r}, renderer, PREFERENCES).rows))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    said = [process.communicate("go\n", timeout=100)[0] for process in processes]
    assert said == ["500\n", "500\n"]
    assert len(list((home / "row_indexes").iterdir())) == 1


@pytest.mark.usefixtures("workers_for_every_file")
def test_a_users_module_with_one_of_our_names_is_not_taken_by_a_worker(
    tmp_path: Path, catalogued: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.py").write_text("raise SystemExit('the user's own')")
    monkeypatch.chdir(tmp_path)
    assert len(index_rows(write(tmp_path, row("a", "b")), catalogued, PREFERENCES).rows) == 1


def test_scripts_without_a_main_guard_may_use_workers(tmp_path: Path) -> None:
    """`multiprocessing` would run the script again in each worker."""
    path = write(tmp_path, *(row("a", "b", f"Q{i}") for i in range(8)))
    script = tmp_path / "script.py"
    script.write_text(
        "from training.utils import row_index\nfrom training.utils.rendering import Renderer\n"
        "from training.utils.preference_rows import PREFERENCES\n"
        "row_index.BYTES_WORTH_WORKERS, row_index.CHUNK_ROWS = 0, 2\n"
        f"print(len(row_index.index_rows({path!r}, Renderer.load('tiny-llama'), PREFERENCES).rows))\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=100
    )
    assert ran.stdout == "8\n"


def test_an_unknown_policy_for_bad_rows_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(ConfigError, match="on_bad_row: 'ignore'"):
        index_rows(write(tmp_path, row("a", "b")), renderer, PREFERENCES, "ignore")  # type: ignore[arg-type]


def test_a_home_that_cannot_be_written_to_is_named(tmp_path: Path, renderer: Renderer, home: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="set FIRESTEEL_HOME"):
        index_rows(write(tmp_path, row("a", "b")), renderer, PREFERENCES)

"""Clearing caches: what is made again is the same, what is in use stays, and what is no cache is not touched."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from runs import RANKS, config, outcome, write_rows

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.sdk import AdamParams, DataError
from training.recipes.dpo_loop import main
from training.utils.caches import CacheEntry, clear, list_caches, list_kept
from training.utils.client import ReconnectableClient
from training.utils.preference_rows import PREFERENCES
from training.utils.reference_cache import cache_file
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows, indexes_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing is but the tiny model."""
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    store.fetch(load_catalog().resolve_model("tiny-llama"))
    return tmp_path / "home"


def kinds() -> list[str]:
    return [entry.kind for entry in list_caches()]


def what_stays(entries: list[CacheEntry]) -> list[str]:
    return [cleared.entry.kind for cleared in clear(entries) if cleared.stays_because]


@RANKS
def test_a_run_after_its_caches_were_cleared_is_the_same_to_the_bit(tmp_path: Path, rank: int) -> None:
    settings = {"lora_rank": rank, "epochs": 2, "eval_fraction": 0.25, "dcp_save_interval": 2}
    first, second = (config(tmp_path / name, 8, **settings) for name in ("first", "second"))
    main(first)
    references, rows = list_caches()
    assert (references.kind, references.count, references.in_use) == ("references", 16, False)
    assert (rows.kind, rows.count, rows.in_use) == ("rows", 8, False)
    cleared = list(clear([references, rows]))
    assert [each.stays_because for each in cleared] == [None, None]
    assert cleared[1].freed == rows.bytes
    assert [(entry.kind, entry.count) for entry in list_caches()] == [("references", 0)]
    main(second)
    assert outcome(first) == outcome(second)
    assert [entry.count for entry in list_caches()] == [16, 8]


@pytest.mark.parametrize("mode", ["upfront", "lazy"])
def test_what_a_run_uses_stays_while_it_trains_and_the_run_does_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    alone, beside = (config(tmp_path / name, 8, reference_pass=mode) for name in ("alone", "beside"))
    main(alone)
    list(clear(list_caches()))
    optim_step, stayed = ReconnectableClient.optim_step, []

    def step_and_clear(client: ReconnectableClient, params: AdamParams) -> object:
        stayed.append((what_stays(list_caches()), [entry.in_use for entry in list_caches()]))
        return optim_step(client, params)

    monkeypatch.setattr(ReconnectableClient, "optim_step", step_and_clear)
    main(beside)
    assert stayed == [(["references", "rows"], [True, True])] * 4
    assert outcome(alone) == outcome(beside)
    assert what_stays(list_caches()) == []


def test_an_index_that_is_cleared_is_made_again_and_one_that_is_open_can_be_read(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", 5)
    index = index_rows(data, Renderer.load("tiny-llama"), PREFERENCES)
    (rows,) = list_caches()
    assert rows.data_sha256 == index.sha256
    assert what_stays([rows]) == ["rows"]
    before = index.rows.copy()
    del index
    assert what_stays([rows]) == []
    assert kinds() == []
    assert (index_rows(data, Renderer.load("tiny-llama"), PREFERENCES).rows == before).all()


def test_an_index_that_another_process_is_making_stays_and_what_a_killed_one_left_goes(home: Path) -> None:
    partial = indexes_folder() / ".partial-0123-4567"
    partial.mkdir(parents=True)
    (partial / "rows.raw").write_bytes(bytes(1000))
    code = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", code, str(partial)], stdout=subprocess.PIPE)
    assert maker.stdout is not None
    with maker.stdout:
        maker.stdout.readline()
        assert kinds() == []
        maker.kill()
        maker.wait()
    (left,) = list_caches()
    assert (left.kind, left.bytes) == ("leftovers", 1000)
    assert what_stays([left]) == []
    assert not partial.exists()


def test_a_killed_fetch_and_a_tokenizer_by_itself_are_caches(home: Path) -> None:
    (model,) = store.stored()
    half = model.with_name(f".partial-{model.name}-01234567")
    half.mkdir()
    (home / "tokenizers").mkdir()
    model.rename(home / "tokenizers" / model.name)
    assert kinds() == ["tokenizers", "leftovers"]
    assert what_stays(list_caches()) == []
    assert kinds() == []


def test_what_is_no_cache_is_listed_with_its_size_and_stays(home: Path) -> None:
    (home / "service").mkdir()
    (home / "service/records.sqlite").write_bytes(bytes(77))
    (home / "notes.txt").write_text("mine")
    list(clear(list_caches()))
    kept = {Path(each.path).name: (each.bytes, each.what.split()[0]) for each in list_kept()}
    assert kept.keys() == {"models", "service", "notes.txt"}
    assert kept["service"] == (77, "records")
    assert kept["notes.txt"] == (4, "not")
    assert (home / "service/records.sqlite").exists()


def test_the_age_of_the_reference_cache_is_that_of_its_last_entry(tmp_path: Path) -> None:
    main(config(tmp_path))
    (references,) = (entry for entry in list_caches() if entry.kind == "references")
    assert references.age_days < 0.1
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(cache_file(), (days_ago, days_ago))
    assert 2.9 < next(e.age_days for e in list_caches() if e.kind == "references") < 3.1


def test_a_file_that_is_no_database_is_listed_and_refused(home: Path) -> None:
    cache_file().write_bytes(b"not a database at all, but a text of some length" * 100)
    (references,) = list_caches()
    assert "cannot be read" in references.holds
    with pytest.raises(DataError, match="move the file away"):
        list(clear([references]))


def test_an_idle_connection_keeps_the_reference_cache(tmp_path: Path) -> None:
    main(config(tmp_path))
    with closing(sqlite3.connect(cache_file(), isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("SELECT count(*) FROM logprobs").fetchone()
        entries = [entry for entry in list_caches() if entry.kind == "references"]
        assert [entry.in_use for entry in entries] == [True]
        assert what_stays(entries) == ["references"]
        assert database.execute("SELECT count(*) FROM logprobs").fetchone() == (12,)
        database.executemany(
            "INSERT INTO logprobs VALUES (?, ?, 0)", ((bytes([i]) * 32, bytes(10**4)) for i in range(100))
        )
    (cleared,) = clear([entry for entry in list_caches() if entry.kind == "references"])
    assert (cleared.stays_because, cleared.freed > 10**6) == (None, True)

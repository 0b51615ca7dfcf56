"""The records on SQLite; `tests/slow/test_postgres.py` has the same on PostgreSQL."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

pytest.register_assert_rewrite("records_spec")

from firesteel import store  # noqa: E402
from firesteel.sdk.errors import ConfigError, StorageError  # noqa: E402
from firesteel.service.records import Job, JobState, Records, default_database  # noqa: E402
from records_spec import BEHAVIOURS, JOB, THREADS  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a database will be."""
    return tmp_path / "records.sqlite"


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_on_sqlite(behaviour: Callable[[str], None], file: Path) -> None:
    behaviour(f"sqlite:///{file}")


def test_a_file_is_written_ahead_and_brought_to_the_disk_by_every_connection(file: Path) -> None:
    full = 2
    with closing(Records.open(f"sqlite:///{file}")) as records:
        with records._transaction() as first, records._transaction() as second:
            for connection in (first, second):
                assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == full
                assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert Path(f"{file}-wal").exists()
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_writer_waits_for_another_and_a_reader_does_not(file: Path) -> None:
    held = 0.7
    with closing(Records.open(f"sqlite:///{file}")) as records:
        other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert records.jobs() == []
        assert time.monotonic() - started < held
        release = threading.Timer(held, lambda: other.execute("COMMIT"))
        release.start()
        assert records.add_job(JOB)
        assert time.monotonic() - started >= held
        release.join()
        other.close()


def test_a_file_that_another_writes_at_this_moment_is_opened_after_it(file: Path) -> None:
    # SQLite itself does not wait where the log would be turned on beside a writer that does not use one.
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    release.start()
    Records.open(f"sqlite:///{file}").close()
    assert release.finished.is_set()
    release.join()
    other.close()


def test_threads_may_make_different_databases_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(THREADS)

    def work(thread: int) -> list[Job]:
        together.wait()
        for number in range(5):
            with closing(Records.open(f"sqlite:///{tmp_path}/{thread}-{number}.sqlite")) as records:
                assert records.add_job(JOB)
        with closing(Records.open(f"sqlite:///{tmp_path}/{thread}-4.sqlite")) as records:
            return records.jobs()

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[JOB]] * THREADS


def test_the_default_lies_in_the_home_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "50%20 off? #1 é"
    with closing(Records.open(default_database(home))) as records:
        records.add_job(JOB)
    assert (home / "records.sqlite").is_file()
    monkeypatch.setenv("FIRESTEEL_HOME", str(home.parent))
    home.rename(home.with_name("service"))
    with closing(Records.open(default_database(None))) as records:
        assert records.jobs() == [JOB]
    assert store.home() == tmp_path
    monkeypatch.chdir(tmp_path)
    assert default_database(Path("here")) == f"sqlite:///{tmp_path}/here/records.sqlite"


def test_a_file_that_is_none_or_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("This is a text and no database. " * 100)
    for path in (tmp_path / "file", tmp_path, tmp_path / "file/records.sqlite"):
        with pytest.raises(StorageError) as caught:
            Records.open(f"sqlite:///{path}")
        assert str(caught.value).startswith(f"records sqlite:///{path}: ")
        assert str(caught.value).endswith("can be reached and written to, or name another")
    assert (tmp_path / "file").read_text().startswith("This is a text")


def test_a_file_without_room_is_one_error_and_keeps_what_it_has(file: Path) -> None:
    with closing(Records.open(f"sqlite:///{file}")) as records:
        records.add_job(JOB)
        with records._engine.connect() as connection:
            # As few pages as there are already, for the one connection of the pool.
            connection.exec_driver_sql("PRAGMA max_page_count=1")
        with pytest.raises(StorageError, match="database or disk is full"):
            records.update_job("account-1", "job-1", JobState.FAILED, "x" * 100_000, JOB.updated)
        assert records.jobs() == [JOB]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file:x?mode=memory&uri=true", "names no file"),
        ("mysql://me:hunter2@127.0.0.1/x", "no support for a database of 'mysql'"),
        ("sqlite+aiosqlite:///x", "no support for a database of 'sqlite.aiosqlite'"),
        ("postgresql+asyncpg://me:hunter2@127.0.0.1/x", "no support"),
        ("records.sqlite", "cannot be read"),
        ("postgresql://me:hunter2@127.0.0.1:port/x", "cannot be read"),
        ("postgresql://me:half@hunter2@127.0.0.1/x", "more than one @"),
        ("postgresql://me:half@hunter2/x@127.0.0.1/x", "more than one @"),
    ],
)
def test_a_url_that_is_none_is_refused_without_showing_its_password(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Records.open(url)
    assert "sqlite:////PATH" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
@pytest.mark.parametrize("place", ["me:hunter2@127.0.0.1:1/x", "me@127.0.0.1:1/x?password=hunter2"])
def test_a_server_that_cannot_be_reached_is_named_without_its_password(scheme: str, place: str) -> None:
    with pytest.raises(StorageError) as caught:
        Records.open(f"{scheme}://{place}")
    assert str(caught.value).startswith("records postgresql://me")
    assert "@127.0.0.1:1/x" in str(caught.value)
    assert "refused" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["", "?connect_timeout=2"])
def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_said(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firesteel.service.records.CONNECT_SECONDS", 30 if setting else 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(StorageError, match="timeout"):
            Records.open(f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/x{setting}")
        assert 1 < time.monotonic() - started < 20

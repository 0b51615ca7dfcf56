"""The records on a real PostgreSQL: all that holds on SQLite, and what only a server can do.

The server keeps its times in Tokyo and isolates transactions more than we ask for: neither may matter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

pytest.register_assert_rewrite("records_spec")

from firesteel.sdk.errors import StorageError  # noqa: E402
from firesteel.service.records import Records  # noqa: E402
from records_spec import BEHAVIOURS, JOB  # noqa: E402

pytestmark = pytest.mark.slow
_numbers = count()
PASSWORD = "hunter2 @:/%"  # as the server knows it
QUOTED = "hunter2%20%40%3A%2F%25"  # as a URL has it
OWNER = "postgres"  # the server refuses to run as root
SETTINGS = "-c timezone=Asia/Tokyo -c default_transaction_isolation=serializable -c fsync=off"


@dataclass(frozen=True)
class Server:
    """A running server, reached by a socket in its folder."""

    programs: Path
    folder: Path

    def url(self, database: str, password: str = QUOTED) -> str:
        return f"postgresql://{OWNER}:{password}@/{database}?host={self.folder}"

    def execute(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self.folder), user=OWNER, password=PASSWORD, dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())

    def control(self, *arguments: str) -> None:
        run(self.folder, self.programs / "pg_ctl", "-D", self.folder / "data", "-w", *arguments)


def run(folder: Path, *command: str | Path) -> None:
    as_owner = ["runuser", "-u", OWNER, "--"] if os.getuid() == 0 else []
    with (folder / "said").open("w+") as said:  # a pipe would stay open in the server
        ran = subprocess.run(
            [*as_owner, *map(str, command)], cwd=folder, stdout=said, stderr=said, check=False
        )
        said.seek(0)
        assert ran.returncode == 0, said.read()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    # Not pytest's folder: only its own user may enter that.
    folder = Path(tempfile.mkdtemp(prefix="firesteel-postgres-"))
    server = Server(found[-1].parent, folder)
    try:
        (folder / "password").write_text(PASSWORD)
        if os.getuid() == 0:
            shutil.chown(folder, OWNER)
            shutil.chown(folder / "password", OWNER)
        run(
            folder, server.programs / "initdb", "-D", folder / "data", "-U", OWNER, "-A", "scram-sha-256",
            "--pwfile", folder / "password", "-E", "UTF8", "--no-sync",
        )  # fmt: skip
        options = f"-k {folder} -c listen_addresses='' {SETTINGS}"
        server.control("-l", str(folder / "log"), "-o", options, "start")
        yield server
        server.control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def url(server: Server) -> str:
    """A fresh database."""
    name = f"test_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_on_postgres(behaviour: Callable[[str], None], url: str) -> None:
    behaviour(url)


def test_the_server_may_be_started_anew(server: Server, url: str) -> None:
    with closing(Records.open(url)) as records:
        assert records.add_job(JOB)
        server.control("-m", "fast", "restart")
        assert records.jobs() == [JOB]


def test_a_server_that_stops_is_one_error_until_it_is_back(server: Server, url: str) -> None:
    with closing(Records.open(url)) as records:
        server.control("-m", "fast", "stop")
        with pytest.raises(StorageError, match=r"^records postgresql://postgres:\*\*\*@/test_") as caught:
            records.add_job(JOB)
        assert "hunter2" not in str(caught.value)
        options = f"-k {server.folder} -c listen_addresses='' {SETTINGS}"
        server.control("-l", str(server.folder / "log"), "-o", options, "start")
        assert records.add_job(JOB)


@pytest.mark.parametrize(
    ("database", "password", "message"),
    [("nowhere", QUOTED, "does not exist"), ("postgres", "hunter3", "password authentication failed")],
)
def test_a_database_that_is_not_there_and_a_wrong_password_are_named(
    server: Server, database: str, password: str, message: str
) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Records.open(server.url(database, password))
    assert str(caught.value).startswith(f"records postgresql://postgres:***@/{database}?host=")
    assert "hunter" not in str(caught.value)


def test_a_role_that_may_not_make_tables_is_one_error(server: Server, url: str) -> None:
    server.execute("CREATE ROLE reader LOGIN PASSWORD 'hunter4'")
    with pytest.raises(StorageError, match="permission denied") as caught:
        Records.open(url.replace(f"{OWNER}:{QUOTED}", "reader:hunter4"))
    assert "hunter4" not in str(caught.value)

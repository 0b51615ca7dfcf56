"""`firesteel keys` as a user runs it: a process, a database, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from firesteel.service import keys
from firesteel.service.records import Records, default_database


def firesteel(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "firesteel.cli.main", "keys", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_key_that_is_made_and_revoked_while_a_server_has_the_records_open(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path))
    with closing(Records.open(default_database(tmp_path))) as records:
        ran = firesteel("create", "--name", "laptop", "--account", "mine", *home)
        assert ran.returncode == 0, ran.stderr
        text = ran.stdout.removesuffix("\n")
        key = keys.check(records, text)
        assert key is not None
        assert (key.name, key.account) == ("laptop", "mine")
        assert ran.stderr == f"{key.key_id} of account mine, shown only now:\n"

        ran = firesteel("revoke", key.key_id, *home)
        assert (ran.returncode, ran.stdout) == (0, f"revoked {key.key_id}\n"), ran.stderr
        assert keys.check(records, text) is None
        ran = firesteel("revoke", key.key_id, *home)
        assert (ran.returncode, ran.stdout) == (0, f"{key.key_id} was revoked before\n")


def test_the_list_shows_all_of_a_key_but_its_text_and_hash(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path))
    assert json.loads(firesteel("list", "--json", *home).stdout) == []
    with closing(Records.open(default_database(tmp_path))) as records:
        (first, text), (second, _) = keys.create(records, "first"), keys.create(records, account="mine")
        records.revoke_key(second.key_id, second.created + timedelta(seconds=1))
    as_table, as_json = firesteel("list", *home), firesteel("list", "--json", *home)
    assert [line.split()[:3] for line in as_table.stdout.splitlines()] == [
        ["ID", "ACCOUNT", "NAME"],
        [first.key_id, first.account, "first"],
        [second.key_id, "mine", "-"],
    ]
    rows = json.loads(as_json.stdout)
    assert [set(row) for row in rows] == [{"key_id", "account", "name", "created", "revoked"}] * 2
    assert datetime.fromisoformat(rows[0]["created"]) == first.created
    assert rows[0]["revoked"] is None
    assert datetime.fromisoformat(rows[1]["revoked"]) == second.created + timedelta(seconds=1)
    for secret in (text, text.removeprefix("fs-"), keys.key_sha256(text)):
        assert secret not in as_table.stdout + as_json.stdout


def test_the_database_is_that_of_the_home_unless_another_is_named(tmp_path: Path) -> None:
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.sqlite"
    assert firesteel("create", FIRESTEEL_HOME=str(tmp_path)).returncode == 0
    assert firesteel("create", "--database", elsewhere, "--account", "there").returncode == 0
    with (
        closing(Records.open(default_database(tmp_path / "service"))) as here,
        closing(Records.open(elsewhere)) as there,
    ):
        assert [key.account == "there" for key in (*here.keys(), *there.keys())] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--account", "Not This"], "error[config]: account 'Not This': expected 1 to 63"),
        (["create", "--name", "two\nlines"], "error[config]: name 'two\\nlines': expected at most 100"),
        (["revoke", "key-9"], "error[config]: key 'key-9' is not there; `firesteel keys list`"),
        (["list", "--database", "mysql://me:hunter2@there/x"], "error[config]: there is no support for"),
        (
            ["list", "--database", "postgresql://me:hunter2@127.0.0.1:1/x"],
            "error[storage]: records postgresql",
        ),
        (["list", "--database", "sqlite:////dev/null/x"], "error[storage]: records sqlite:////dev/null/x: "),
    ],
    ids=["account", "name", "unknown key", "unknown database", "no server", "no folder"],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = firesteel(*arguments, FIRESTEEL_HOME=str(tmp_path))
    assert (ran.returncode, ran.stderr.startswith(message)) == (2, True), ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "hunter2" not in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("missing", ["sqlalchemy", "alembic"])
def test_without_the_server_extra_the_command_says_what_to_install(tmp_path: Path, missing: str) -> None:
    # A module that is None in sys.modules is to Python one that is not installed.
    script = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['firesteel', 'keys', 'list']\n"
        "from firesteel.cli.main import run\nrun()"
    )
    environment = {**os.environ, "FIRESTEEL_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("error[config]: ")
    assert missing in ran.stderr
    assert ran.stderr.endswith("pip install 'firesteel[server]'\n")
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_database_code() -> None:
    script = (
        "import sys; sys.argv = ['firesteel', 'keys', 'create', '--help']\n"
        "from firesteel.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "print('loaded:', sorted({'torch', 'rich', 'sqlalchemy', 'alembic'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--account" in ran.stdout
    assert ran.stdout.endswith("loaded: []\n")

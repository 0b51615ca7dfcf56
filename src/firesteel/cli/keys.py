"""`firesteel keys …`: who may call the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firesteel.sdk.errors import ConfigError

if TYPE_CHECKING:
    from firesteel.service.records import Key, Records

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True, rich_markup_mode=None)
_Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the server's files, the database too; default: FIRESTEEL_HOME."),
]
_Database = Annotated[
    str | None,
    typer.Option("--database", help="The server's database, if another: sqlite:///… or postgresql://…"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="For people, to tell keys apart.")] = "",
    account: Annotated[str | None, typer.Option(help="Account; default: a new one.")] = None,
    home: _Home = None,
    database: _Database = None,
) -> None:
    """Make a key and print it: it is shown this once, and only its hash is kept."""
    with _records(home, database) as records:
        from firesteel.service import keys

        key, text = keys.create(records, name, account)
    typer.echo(f"{key.key_id} of account {key.account}, shown only now:", err=True)
    typer.echo(text)


@app.command("list")
def list_keys(home: _Home = None, database: _Database = None, as_json: _Json = False) -> None:
    """Show all keys, without their text."""
    with _records(home, database) as records:
        keys = records.keys()
    if as_json:
        typer.echo(json.dumps([_fields(key) for key in keys], indent=1))
        return
    cells = [("ID", "ACCOUNT", "NAME", "CREATED", "REVOKED")]
    cells += [_cells(key) for key in keys]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    for line in cells:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `firesteel keys list` shows it.")],
    home: _Home = None,
    database: _Database = None,
) -> None:
    """Let a key open nothing more, from now on."""
    with _records(home, database) as records:
        from firesteel.service.records import now

        revoked = records.revoke_key(key_id, now())
        known = records.keys()
    if key_id not in {key.key_id for key in known}:
        raise ConfigError(f"key {key_id!r} is not there; `firesteel keys list` shows those that are")
    typer.echo(f"revoked {key_id}" if revoked else f"{key_id} was revoked before")


@contextmanager
def _records(home: Path | None, database: str | None) -> Iterator[Records]:
    try:
        from firesteel.service.records import Records, default_database
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; the server's commands need: pip install 'firesteel[server]'") from error
    records = Records.open(database or default_database(home))
    try:
        yield records
    finally:
        records.close()


def _fields(key: Key) -> dict[str, str | None]:
    revoked = key.revoked and key.revoked.isoformat()
    return asdict(key) | {"created": key.created.isoformat(), "revoked": revoked}


def _cells(key: Key) -> tuple[str, str, str, str, str]:
    revoked = f"{key.revoked:%Y-%m-%d %H:%M:%S}" if key.revoked else "-"
    return key.key_id, key.account, key.name or "-", f"{key.created:%Y-%m-%d %H:%M:%S}", revoked

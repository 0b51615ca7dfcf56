"""The schema of the records, step by step: `versions/` holds one file per change, in the order of their numbers.

A step that was released is never edited; the next change is the next file. A step repeats the tables as they are to
be then, and does not import those of `records.py`, which go on changing.
"""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from firesteel.sdk.errors import ConfigError

# Not alembic's own name: a PostgreSQL database may be shared with a program that uses alembic too.
VERSION_TABLE = "firesteel_schema"
BEGIN = "firesteel_begin"
"""The option of a connection that names the statement with which its transactions begin on SQLite."""
_POSTGRES_LOCK = 0x66697265737465  # any number that nobody else takes
# Alembic keeps the migration that runs in globals of its module.
_one_at_a_time = threading.Lock()


def upgrade(engine: Engine, shown: str) -> None:
    """Bring a database to this program's schema; processes that do so at once wait for each other.

    All steps are one transaction. Raises `ConfigError`, which calls the database `shown`, where a newer program has
    been there.
    """
    with _one_at_a_time, engine.connect() as plain:
        connection = plain.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _POSTGRES_LOCK})
            config = _config(connection)
            _refuse_newer(connection, ScriptDirectory.from_config(config), shown)
            command.upgrade(config, "head")


def _config(connection: Connection) -> Config:
    folder = str(Path(__file__).parent).replace("%", "%%")  # a % is the start of a name in alembic's settings
    config = Config()
    config.set_main_option("script_location", folder)
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _refuse_newer(connection: Connection, steps: ScriptDirectory, shown: str) -> None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    known = {step.revision for step in steps.walk_revisions()}
    if unknown := set(context.get_current_heads()) - known:
        raise ConfigError(
            f"records {shown}: the schema is {', '.join(sorted(unknown))}, newer than the {steps.get_current_head()} "
            "of this program; use the newer Firesteel that made it, or name another database"
        )

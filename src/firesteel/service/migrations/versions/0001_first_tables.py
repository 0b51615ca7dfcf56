"""API keys, trainer jobs, checkpoints and promoted models."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the four tables."""
    _make_keys()
    _make_jobs()
    _make_checkpoints()
    _make_models()


def _text(name: str, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=key, nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _make_keys() -> None:
    op.create_table(
        "api_keys",
        _text("key_id", key=True),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        _text("account"),
        _text("name"),
        _time("created"),
        _time("revoked", nullable=True),
    )


def _make_jobs() -> None:
    op.create_table(
        "jobs",
        _text("account", key=True),
        _text("job_id", key=True),
        _text("base_model"),
        _number("lora_rank"),
        _text("shape"),
        sa.Column("forward_only", sa.Boolean, nullable=False),
        _number("max_context_length"),
        _text("state"),
        _text("message"),
        _text("request_sha256"),
        _text("display_name"),
        _number("inactivity_timeout_s", nullable=True),
        _time("created"),
        _time("updated"),
    )


def _make_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        _text("account", key=True),
        _text("owner", key=True),
        _text("name", key=True),
        _text("kind", key=True),
        _text("base_model"),
        sa.Column("lora", sa.JSON, nullable=True),
        _text("folder"),
        _number("size"),
        _time("created"),
    )


def _make_models() -> None:
    op.create_table(
        "models",
        _text("account", key=True),
        _text("model_id", key=True),
        _text("base_model"),
        _text("kind"),
        _number("lora_rank"),
        _text("folder"),
        _text("checkpoint"),
        _time("created"),
    )

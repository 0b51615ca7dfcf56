"""What alembic runs to migrate: in the transaction that `migrations.upgrade` has begun."""

from __future__ import annotations

from alembic import context

from firesteel.service.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()

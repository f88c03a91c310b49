"""Brings a database to the schema of this version, by Alembic's steps in `migrations/`."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from ....proto.errors import Incompatible
from .database import Database

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK = 0x697374686D7573  # "isthmus": PostgreSQL's advisory lock of whoever migrates


def migrate(database: Database) -> None:
    """Creates or upgrades the tables; does nothing where they are current.

    Incompatible where a newer isthmus has upgraded them; Unavailable or Exhausted as `Database.write`.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    with database.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))  # a large table takes what it takes
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        found, head = _revisions(connection, config)
        if found == head:
            return
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revisions(connection: Connection, config: Config) -> tuple[str | None, str | None]:
    """The database's and ours; Incompatible where the database's is not one of ours."""
    scripts = ScriptDirectory.from_config(config)
    head, found = scripts.get_current_head(), MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    if found is not None and found not in known:
        raise Incompatible(
            f"the database of jobs {connection.engine.url.render_as_string()} has schema {found}, newer than {head} of "
            "this isthmus: upgrade isthmus, or name another database with --jobs-db"
        )
    return found, head

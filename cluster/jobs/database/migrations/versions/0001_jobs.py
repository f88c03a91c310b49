"""Jobs, their requests and events; labels; counts of tenants; leases of gateways."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _jobs()
    op.create_table(
        "requests",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("item", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("cost_tokens", sa.Integer, nullable=False),
        sa.Column("result", sa.LargeBinary),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_us", sa.BigInteger, nullable=False),
        sa.Column("state", sa.SmallInteger),
        sa.Column("item", sa.Integer),
        sa.Column("body", sa.LargeBinary),
    )
    op.create_index("events_by_item", "events", ["job_id", "item"])
    op.create_table(
        "labels",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(63), primary_key=True),
        sa.Column("value", sa.String(255), nullable=False),
    )
    op.create_index("labels_by_value", "labels", ["key", "value"])
    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("active_jobs", sa.BigInteger, nullable=False),
        sa.Column("queued_tokens", sa.BigInteger, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("address", sa.String(255), nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("idempotency_key", sa.String(128)),
        sa.Column("body_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("fingerprint", sa.String(128), nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("resumes", sa.Integer, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("started_us", sa.BigInteger),
        sa.Column("ended_us", sa.BigInteger),
        sa.Column("deadline_us", sa.BigInteger),
        sa.Column("retention_us", sa.BigInteger, nullable=False),
        sa.Column("expire_us", sa.BigInteger),
        sa.Column("request_count", sa.Integer, nullable=False),
        sa.Column("succeeded", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("queued_tokens", sa.BigInteger, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
        sa.Column("last_event", sa.BigInteger, nullable=False),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
    )
    op.create_index("jobs_by_key", "jobs", ["tenant", "idempotency_key"], unique=True)
    op.create_index("jobs_to_claim", "jobs", ["state", "owner", "priority", "created_us"])
    op.create_index("jobs_by_owner", "jobs", ["owner"])
    op.create_index("jobs_by_time", "jobs", ["created_us", "id"])
    op.create_index("jobs_to_prune", "jobs", ["expire_us"])
    op.create_index("jobs_by_deadline", "jobs", ["ended_us", "deadline_us"])

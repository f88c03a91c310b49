"""The tables. `migrations/` builds the same ones step by step; a test compares the two.

Times are microseconds since 1970, by the database's clock. States are `JobState` numbers, priorities `Priority` ones.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, SmallInteger, String, Table, Text

METADATA = MetaData()

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("idempotency_key", String(128)),
    Column("body_hash", LargeBinary(32), nullable=False),  # of the whole submission, but for the key
    Column("fingerprint", String(128), nullable=False),  # of the model: only a gateway that serves it takes the job
    Column("state", SmallInteger, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("owner", String(64)),  # the gateway process that runs it, and alone may write its progress
    Column("resumes", Integer, nullable=False),
    Column("labels", Text, nullable=False),  # JSON, to show; `labels` is to search
    Column("created_us", BigInteger, nullable=False),
    Column("started_us", BigInteger),
    Column("ended_us", BigInteger),
    Column("deadline_us", BigInteger),
    Column("retention_us", BigInteger, nullable=False),
    Column("expire_us", BigInteger),  # of a job that has ended; 0: deleted, to be erased
    Column("request_count", Integer, nullable=False),
    Column("succeeded", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("queued_tokens", BigInteger, nullable=False),  # of prompts and limits of requests that have not ended
    Column("stored_bytes", BigInteger, nullable=False),
    Column("last_event", BigInteger, nullable=False),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Index("jobs_by_key", "tenant", "idempotency_key", unique=True),
    Index("jobs_to_claim", "state", "owner", "priority", "created_us"),
    Index("jobs_by_owner", "owner"),
    Index("jobs_by_time", "created_us", "id"),
    Index("jobs_to_prune", "expire_us"),
    Index("jobs_by_deadline", "ended_us", "deadline_us"),
)

REQUESTS = Table(
    "requests",
    METADATA,
    Column("job_id", String(64), primary_key=True),
    Column("item", Integer, primary_key=True, autoincrement=False),  # position in the submission, from 0
    Column("state", SmallInteger, nullable=False),  # QUEUED until it has ended
    Column("body", LargeBinary, nullable=False),  # GenerateRequest, with a seed
    Column("prompt_tokens", Integer, nullable=False),
    Column("cost_tokens", Integer, nullable=False),  # prompt and max_tokens
    Column("result", LargeBinary),  # JobResult, once it has ended
)

EVENTS = Table(
    "events",
    METADATA,
    Column("job_id", String(64), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("time_us", BigInteger, nullable=False),
    Column("state", SmallInteger),  # of an event that is a new state of the job
    Column("item", Integer),  # of an event that is output of one request
    Column("body", LargeBinary),  # JobOutput
    Index("events_by_item", "job_id", "item"),
)

LABELS = Table(
    "labels",
    METADATA,
    Column("job_id", String(64), primary_key=True),
    Column("key", String(63), primary_key=True),
    Column("value", String(255), nullable=False),
    Index("labels_by_value", "key", "value"),
)

TENANTS = Table(
    "tenants",
    METADATA,
    Column("tenant", String(128), primary_key=True),
    Column("active_jobs", BigInteger, nullable=False),
    Column("queued_tokens", BigInteger, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
)

GATEWAYS = Table(
    "gateways",
    METADATA,
    Column("id", String(64), primary_key=True),  # of one process: another start is another id
    Column("address", String(255), nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

"""Forgetting jobs: deleted by their owner, or past their retention. Large ones go in pieces, in the background."""

from sqlalchemy import delete, select, update

from ....proto.errors import IllegalState
from ..database.schema import EVENTS, JOBS, LABELS, REQUESTS, TENANTS
from ..database.writer import Tx
from ..states import JobState
from .progress import count, locked_row

PIECE = 2_000  # rows of one table at a time: other changes wait for no longer than that takes


def forget(tx: Tx, job_id: str, tenant: str | None = None) -> None:
    """Deletes a job that has ended: gone for everybody at once, erased by `erase`. NotFound, IllegalState."""
    row = locked_row(tx, job_id, tenant)
    state = JobState(row["state"])
    if not state.ended:
        raise IllegalState(f"job {job_id} is {state.name} and cannot be deleted: cancel it first, or wait for its end")
    tx.connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(expire_us=0, idempotency_key=None))


def erase(tx: Tx) -> bool:
    """Erases some rows of the jobs that are to go; whether there may be more."""
    over = JOBS.c.expire_us <= tx.now_us
    row = tx.connection.execute(select(JOBS).where(over).order_by(JOBS.c.expire_us).limit(1)).mappings().first()
    if row is None:
        return False
    job_id = row["id"]
    if row["expire_us"] > 0:  # hidden before the first of its rows goes
        tx.connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(expire_us=0, idempotency_key=None))
    for table, key in ((EVENTS, EVENTS.c.number), (REQUESTS, REQUESTS.c.item)):
        of_job = table.c.job_id == job_id
        piece = tx.connection.execute(select(key).where(of_job).order_by(key).limit(PIECE)).scalars().all()
        if piece:
            tx.connection.execute(delete(table).where(of_job, key <= piece[-1]))
        if len(piece) == PIECE:
            return True
    tx.connection.execute(delete(LABELS).where(LABELS.c.job_id == job_id))
    tx.connection.execute(delete(JOBS).where(JOBS.c.id == job_id))
    count(tx, [(row["tenant"], {"stored_bytes": -row["stored_bytes"]})])
    _forget_tenant(tx, row["tenant"])
    return True


def _forget_tenant(tx: Tx, tenant: str) -> None:
    """Erases the counts of a tenant that has no job any more."""
    jobs = select(JOBS.c.id).where(JOBS.c.tenant == tenant).exists()
    tx.connection.execute(delete(TENANTS).where(TENANTS.c.tenant == tenant, TENANTS.c.active_jobs == 0, ~jobs))

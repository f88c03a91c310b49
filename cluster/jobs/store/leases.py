"""Who runs which job: gateways hold leases, jobs have an owner, and the jobs of a dead gateway go to another.

A gateway's id is of one process. Every write of progress names it as the job's owner (`progress.record`), so a gateway
that was taken for dead and wakes up writes nothing any more: the id is the fencing token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update

from ..database.schema import GATEWAYS, JOBS, REQUESTS
from ..database.writer import Tx
from ..states import OPEN, JobState
from .progress import start

FIRST_PAGE = 64  # jobs of at most so many requests are claimed together with their requests


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A job that this gateway runs from now on."""

    job_id: str
    tenant: str
    priority: int
    deadline_us: int | None
    has_output: bool  # of another gateway, before
    requests: Sequence[Mapping[Any, Any]] | None  # rows that have not ended; None: too many to come along


def join(tx: Tx, gateway: str, address: str, lease_us: int) -> None:
    """Begins a lease. An earlier process of the same address is dead, since this one listens there: its lease ends."""
    before = tx.connection.execute(select(GATEWAYS.c.id).where(GATEWAYS.c.address == address)).scalars().all()
    _end_leases(tx, before)
    tx.connection.execute(insert(GATEWAYS), {"id": gateway, "address": address, "expires_us": tx.now_us + lease_us})


def renew(tx: Tx, gateway: str, lease_us: int) -> bool:
    """Whether the lease still was there."""
    mine = update(GATEWAYS).where(GATEWAYS.c.id == gateway).values(expires_us=tx.now_us + lease_us)
    return tx.connection.execute(mine).rowcount == 1


def leave(tx: Tx, gateway: str) -> None:
    """Ends a lease; its jobs may be claimed at once."""
    _end_leases(tx, [gateway])


def end_expired(tx: Tx) -> None:
    """Ends the leases of gateways that have been silent too long."""
    query = select(GATEWAYS.c.id).where(GATEWAYS.c.expires_us < tx.now_us).with_for_update()
    _end_leases(tx, tx.connection.execute(query).scalars().all())


def _end_leases(tx: Tx, gateways: Sequence[str]) -> None:
    if gateways:
        lost = JOBS.c.owner.in_(gateways)
        tx.connection.execute(update(JOBS).where(lost).values(owner=None, resumes=JOBS.c.resumes + 1))
        tx.connection.execute(delete(GATEWAYS).where(GATEWAYS.c.id.in_(gateways)))


def claim(
    tx: Tx, gateway: str, fingerprint: str, priorities: Sequence[int], limit: int, but: Sequence[str] = ()
) -> list[Claimed]:
    """Up to `limit` jobs of these classes that nobody runs, those first that ran before, then by class and age; none of
    the tenants `but`."""
    rows: list[Mapping[Any, Any]] = []
    for state in sorted(OPEN, reverse=True):
        for priority in priorities:
            if len(rows) < limit:
                rows += _free(tx, fingerprint, state, priority, limit - len(rows), but)
    start(tx, rows, gateway)
    small = [row["id"] for row in rows if row["request_count"] <= FIRST_PAGE]
    requests: dict[str, list[Mapping[Any, Any]]] = {job_id: [] for job_id in small}
    waiting = REQUESTS.c.job_id.in_(small) & (REQUESTS.c.state == JobState.QUEUED.value)
    if small:
        query = select(REQUESTS).where(waiting).order_by(REQUESTS.c.job_id, REQUESTS.c.item)
        for request in tx.connection.execute(query).mappings():
            requests[request["job_id"]].append(request)
    return [_claimed(row, requests.get(row["id"])) for row in rows]


def _free(
    tx: Tx, fingerprint: str, state: JobState, priority: int, limit: int, but: Sequence[str]
) -> Sequence[Mapping[Any, Any]]:
    values = {"b_state": state.value, "b_priority": priority, "b_fingerprint": fingerprint, "b_limit": limit}
    values |= {"b_but": list(but)}
    return tx.connection.execute(_FREE, values).mappings().all()


def _claimed(row: Mapping[Any, Any], requests: Sequence[Mapping[Any, Any]] | None) -> Claimed:
    return Claimed(
        job_id=row["id"],
        tenant=row["tenant"],
        priority=row["priority"],
        deadline_us=row["deadline_us"],
        has_output=row["output_tokens"] > 0,
        requests=requests,
    )


# Built once: building a statement costs more than executing it.
_FREE = (
    select(JOBS)
    .where(JOBS.c.state == bindparam("b_state"), JOBS.c.owner.is_(None), JOBS.c.priority == bindparam("b_priority"))
    .where(JOBS.c.fingerprint == bindparam("b_fingerprint"))
    .where(JOBS.c.tenant.not_in(bindparam("b_but", expanding=True)))
    .order_by(JOBS.c.created_us)
    .limit(bindparam("b_limit"))
    .with_for_update(skip_locked=True)
)

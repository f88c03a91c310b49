"""Routing tables and reports of workers that differ in what a test is about."""

from collections.abc import Iterable
from typing import Any

from isthmus.cluster.fleet.report import Health, Report
from isthmus.cluster.router.costs import Demand
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import PrefillTime, StepTime, WorkerLoad

CODECS = {"raw": "r0", "tq-k4v4": "t0"}
KEYS = tuple((64 * (page + 1), bytes([page]) * 16) for page in range(4))


def load(address: str, **changes: Any) -> WorkerLoad:
    fields: dict[str, Any] = {
        "codecs": CODECS,
        "page_tokens": 64,
        "pages_total": 1000,
        "pages_free": 1000,
        "prefill": PrefillTime(5, 0.5, 0.01),
        "step": StepTime(5, 0.5, 0.01),
    }
    return WorkerLoad(**{"address": address, **fields, **changes})


def routing_table(prefill: int = 2, decode: int = 2, **changes: Any) -> RoutingTable:
    """Workers p0, p1, ... and d0, d1, ...; `changes` maps an address to what differs there."""
    return routing_table_of(
        [load(f"p{number}", **changes.get(f"p{number}", {})) for number in range(prefill)],
        [load(f"d{number}", **changes.get(f"d{number}", {})) for number in range(decode)],
    )


def demand(**changes: Any) -> Demand:
    return Demand(**{"prompt_tokens": 1000, "max_tokens": 100, "codec": "raw", **changes})


def report(address: str, **changes: Any) -> Report:
    """A ready worker; the address begins with "p" or "d" for its role."""
    fields: dict[str, Any] = {
        "worker_id": address,
        "instance": "one.1",
        "role": "prefill" if address.startswith("p") else "decode",
        "health": Health.READY,
        "protocol_version": 1,
        "fingerprint": "f",
        "codecs": {"raw": "r0"},
        "default_codec": "raw",
        "page_tokens": 64,
        "pages_total": 1000,
        "pages_free": 1000,
        "prefill": PrefillTime(5, 0.5, 0.01),
        "step": StepTime(5, 0.5, 0.01),
    }
    return Report(**{**fields, **changes})


def routing_table_of(prefill: Iterable[WorkerLoad], decode: Iterable[WorkerLoad]) -> RoutingTable:
    """A table of these workers."""
    table = RoutingTable()
    for workers, loads in ((table.prefill, prefill), (table.decode, decode)):
        for load in loads:
            workers.update(load)
    return table

"""One job that this gateway runs, as far as it is in memory."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ....proto.common_pb2 import PRIORITY_BATCH
from ....proto.generation_pb2 import GenerateRequest
from ..store.leases import Claimed


class ActiveJob:
    """Requests still to start, page by page, and those that run."""

    PAGE = 64  # requests that are read at once

    def __init__(self, claimed: Claimed) -> None:
        self.job_id = claimed.job_id
        self.tenant = claimed.tenant
        self.priority = claimed.priority
        self.has_output = claimed.has_output
        self.pending: deque[Mapping[Any, Any]] = deque(claimed.requests or ())
        self.all_loaded = claimed.requests is not None
        self.last_item = -1  # that was read
        self.bugs = 0  # in reading it
        self.running: dict[int, asyncio.Task[None]] = {}
        self._deadline_us = claimed.deadline_us

    @property
    def is_batch(self) -> bool:
        """Whether it fills idle capacity only."""
        return self.priority == PRIORITY_BATCH

    def take(self, rows: Sequence[Mapping[Any, Any]]) -> None:
        """A further page."""
        self.pending.extend(rows)
        self.all_loaded = len(rows) < self.PAGE
        if rows:
            self.last_item = rows[-1]["item"]

    def request_of(self, row: Mapping[Any, Any]) -> GenerateRequest:
        """The request as it runs; DecodeError where what is kept of it is damaged."""
        request = GenerateRequest.FromString(row["body"])
        request.tenant = self.tenant
        request.priority = self.priority  # pyright: ignore[reportAttributeAccessIssue]
        request.request_id = request.request_id or f"{self.job_id}.{row['item']}"
        return request

    def time_left(self) -> float | None:
        """Seconds to its deadline; None where it has none."""
        return None if self._deadline_us is None else self._deadline_us / 1e6 - time.time()

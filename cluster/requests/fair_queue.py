"""Which requests start, which wait, and which are refused at once. Pure: time and load come in as arguments.

The gateway lets so many tokens of prompts and outputs run at once as the decode workers have room for, times
`overcommit`. What does not fit waits in a bounded queue for each class of priority. A lower class starts only where no
higher one waits; within a class the tenant goes first that has been given the fewest tokens for its weight (start-time
fair queueing: Goyal, Vin and Cheng, 1996), so that one tenant's flood does not delay another's request.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ...proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from ...proto.errors import Exhausted, Expired
from ..router.estimates import LatencyEstimate

TOLERANCE = 2.0  # times that the earliest end may lie beyond the deadline: part of an answer is of use, too
MAX_TENANTS = 10_000  # whose share is remembered, the heaviest users first
RANKS = (PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH)  # in the order they start


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the queue knows of a request."""

    priority: int
    tenant: str
    tokens: int  # prompt and output at most
    weight: float | None = None  # its caller's; None: the tenant's by the settings


@dataclass(eq=False)
class Ticket:
    """A request that waits or runs."""

    arrival: float  # virtual time at which it came
    number: int
    claim: Claim
    started: bool = False


class FairQueue:
    """The queues. `enqueue`, then `start` until the ticket is started, then `remove`, whatever happened."""

    def __init__(self, *, max_waiting: int, weights: Mapping[str, float]) -> None:
        self._max_waiting, self._weights = max_waiting, weights
        self._waiting: dict[int, list[Ticket]] = {rank: [] for rank in RANKS}
        self._numbers = itertools.count()
        self._virtual_time = 0.0  # the start time of the request that started last
        self._finish: dict[str, float] = {}  # virtual finish time of each tenant's latest request that started
        self.running_tokens = 0
        self._tokens_per_s = 0.0  # that end, averaged; 0 before any did
        self._ended_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait, of all classes."""
        return sum(len(queue) for queue in self._waiting.values())

    def enqueue(
        self, claim: Claim, capacity: int, time_left_s: float | None, estimate: LatencyEstimate | None = None
    ) -> Ticket:
        """A place in the queue; `start` may return it at once.

        Exhausted where its class's queue is full; Expired where what waits ahead, and then the first token by the
        estimate, take longer than it has time, or where the least output that it demands is far out of reach.
        """
        queue = self._waiting[claim.priority]
        if len(queue) >= self._max_waiting:
            raise Exhausted(f"{len(queue)} requests of this priority wait already; try again later")
        if time_left_s is not None:
            _check_deadline(self.wait_s(claim, capacity), time_left_s, estimate or LatencyEstimate())
        ticket = Ticket(self._virtual_time, next(self._numbers), claim)
        queue.append(ticket)
        return ticket

    def start(self, capacity: int) -> list[Ticket]:
        """Starts the tickets that come next, with `capacity` tokens for all that run; one always runs."""
        started = []
        for rank in RANKS:
            queue = self._waiting[rank]
            while queue:
                ticket = min(queue, key=lambda waiting: (self._start_time(waiting), waiting.number))
                if self.running_tokens and self.running_tokens + ticket.claim.tokens > capacity:
                    return started  # those behind, and lower classes, must not overtake it for ever
                queue.remove(ticket)
                ticket.started = True
                self._charge(ticket)
                self.running_tokens += ticket.claim.tokens
                started.append(ticket)
        return started

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """A request has ended, or waits no more."""
        if not ticket.started:
            queue = self._waiting[ticket.claim.priority]
            if ticket in queue:
                queue.remove(ticket)
            return
        self.running_tokens -= ticket.claim.tokens
        if self._ended_s is not None and now_s > self._ended_s:
            rate = ticket.claim.tokens / (now_s - self._ended_s)
            self._tokens_per_s += 0.1 * (rate - self._tokens_per_s) if self._tokens_per_s else rate
        self._ended_s = now_s
        if not self.running_tokens and not self.waiting:
            self._finish.clear()  # nobody waited: all tenants are equal again

    def _start_time(self, ticket: Ticket) -> float:
        """Virtual time at which it may start: after what its tenant was given before."""
        return max(ticket.arrival, self._finish.get(ticket.claim.tenant, 0.0))

    def _charge(self, ticket: Ticket) -> None:
        """Counts a request that starts now as given to its tenant: one that goes away before costs it nothing."""
        tenant, start = ticket.claim.tenant, self._start_time(ticket)
        self._virtual_time = max(self._virtual_time, start)
        weight = ticket.claim.weight or self._weights.get(tenant, 1.0)
        self._finish[tenant] = start + ticket.claim.tokens / weight
        if len(self._finish) > MAX_TENANTS:  # a finish time that has passed says nothing; of the others half may stay
            ahead = [item for item in self._finish.items() if item[1] > self._virtual_time]
            self._finish = dict(sorted(ahead, key=lambda item: item[1])[-MAX_TENANTS // 2 :])

    def wait_s(self, claim: Claim, capacity: int) -> float:
        """About how long a request would wait; 0 where it fits, or nothing is known yet."""
        ahead = sum(
            ticket.claim.tokens
            for rank in RANKS[: RANKS.index(claim.priority) + 1]  # pyright: ignore[reportArgumentType]
            for ticket in self._waiting[rank]
        )
        excess = self.running_tokens + ahead + claim.tokens - capacity
        return max(0.0, excess / self._tokens_per_s) if self._tokens_per_s and self.running_tokens else 0.0


def _check_deadline(wait_s: float, left_s: float, estimate: LatencyEstimate) -> None:
    """Expired where a deadline cannot be met; with a hint when to try again, unless that would change nothing."""
    begin_s, deadline = wait_s + estimate.ttft_s, f"the deadline is in {_time(left_s)}: not begun"
    if estimate.idle_ttft_s > left_s:
        raise Expired(f"the first token takes about {_time(estimate.idle_ttft_s)} with nothing ahead, and {deadline}")
    if estimate.finish_s > TOLERANCE * left_s:
        raise Expired(f"the answer takes about {_time(estimate.finish_s)} at least, and {deadline}")
    if begin_s > left_s:
        queue = f"about {_time(wait_s)} of requests wait ahead"
        first = f", the first token then takes about {_time(estimate.ttft_s)}" if estimate.ttft_s else ""
        error = Expired(f"{queue}{first}, and {deadline}")
        error.retry_after_s = begin_s - left_s
        raise error


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"

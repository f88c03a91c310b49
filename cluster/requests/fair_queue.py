"""Who may start now, who waits, and who is refused at once. Pure: time and load come in as arguments.

The gateway lets so many tokens of prompts and outputs run at once as the decode workers can hold, times `overcommit`.
What does not fit waits in a bounded queue for each class of priority. A lower class starts only where no higher one
waits; within a class the tenant goes first that has been given the fewest tokens for its weight (start-time fair
queueing: Goyal, Vin and Cheng, 1996), so that one tenant's flood does not delay another's request.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ...proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from ...proto.errors import Exhausted, Expired
from ..router.estimates import Expected

CLEARLY = 2.0  # times that the earliest end may lie beyond the deadline: part of an answer is of use, too
MAX_TENANTS = 10_000  # whose share is kept in mind, the heaviest users first
RANKS = (PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH)  # in the order they start


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What admission knows of a request."""

    priority: int
    tenant: str
    tokens: int  # prompt and output at most


@dataclass(eq=False)
class Ticket:
    """A request that waits or runs."""

    came: float  # virtual time at which it came
    number: int
    wanted: Wanted
    started: bool = False


class Admission:
    """The queues. `ask`, then `start` until the ticket is started, then `leave`, whatever happened."""

    def __init__(self, *, max_waiting: int, weights: Mapping[str, float]) -> None:
        self._max_waiting, self._weights = max_waiting, weights
        self._waiting: dict[int, list[Ticket]] = {rank: [] for rank in RANKS}
        self._numbers = itertools.count()
        self._turn = 0.0  # of the request that started last
        self._last: dict[str, float] = {}  # the turn after each tenant's latest request that started
        self.running_tokens = 0
        self._tokens_per_s = 0.0  # that end, averaged; 0 before any did
        self._ended_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait, of all classes."""
        return sum(len(queue) for queue in self._waiting.values())

    def ask(self, wanted: Wanted, capacity: int, time_left_s: float | None, expected: Expected | None = None) -> Ticket:
        """A place in the queue, which may have its turn at once.

        Exhausted where its class's queue is full; Expired where what waits ahead, and then the first token as far as
        that is `expected`, take longer than it has time, or where what it insists on is far out of reach.
        """
        queue = self._waiting[wanted.priority]
        if len(queue) >= self._max_waiting:
            raise Exhausted(f"{len(queue)} requests of this priority wait already; try again later")
        if time_left_s is not None:
            _check_deadline(self.wait_s(wanted, capacity), time_left_s, expected or Expected())
        ticket = Ticket(self._turn, next(self._numbers), wanted)
        queue.append(ticket)
        return ticket

    def start(self, capacity: int) -> list[Ticket]:
        """The tickets whose turn it is, with `capacity` tokens for all that run; one always runs."""
        started = []
        for rank in RANKS:
            queue = self._waiting[rank]
            while queue:
                ticket = min(queue, key=lambda waiting: (self._turn_of(waiting), waiting.number))
                if self.running_tokens and self.running_tokens + ticket.wanted.tokens > capacity:
                    return started  # those behind, and lower classes, must not overtake it for ever
                queue.remove(ticket)
                ticket.started = True
                self._charge(ticket)
                self.running_tokens += ticket.wanted.tokens
                started.append(ticket)
        return started

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """A request has ended, or waits no more."""
        if not ticket.started:
            queue = self._waiting[ticket.wanted.priority]
            if ticket in queue:
                queue.remove(ticket)
            return
        self.running_tokens -= ticket.wanted.tokens
        if self._ended_s is not None and now_s > self._ended_s:
            rate = ticket.wanted.tokens / (now_s - self._ended_s)
            self._tokens_per_s += 0.1 * (rate - self._tokens_per_s) if self._tokens_per_s else rate
        self._ended_s = now_s
        if not self.running_tokens and not self.waiting:
            self._last.clear()  # nobody was kept waiting: all are equal again

    def _turn_of(self, ticket: Ticket) -> float:
        """Virtual time at which it may start: after what its tenant was given before."""
        return max(ticket.came, self._last.get(ticket.wanted.tenant, 0.0))

    def _charge(self, ticket: Ticket) -> None:
        """Counts a request that starts now as given to its tenant: one that goes away before costs it nothing."""
        tenant, turn = ticket.wanted.tenant, self._turn_of(ticket)
        self._turn = max(self._turn, turn)
        self._last[tenant] = turn + ticket.wanted.tokens / self._weights.get(tenant, 1.0)
        if len(self._last) > MAX_TENANTS:  # whose turn is past is as good as a new one; of the others half may stay
            ahead = sorted((item for item in self._last.items() if item[1] > self._turn), key=lambda item: item[1])
            self._last = dict(ahead[-MAX_TENANTS // 2 :])

    def wait_s(self, wanted: Wanted, capacity: int) -> float:
        """About how long a request would wait; 0 where it fits, or nothing is known yet."""
        ahead = sum(
            ticket.wanted.tokens
            for rank in RANKS[: RANKS.index(wanted.priority) + 1]  # pyright: ignore[reportArgumentType]
            for ticket in self._waiting[rank]
        )
        excess = self.running_tokens + ahead + wanted.tokens - capacity
        return max(0.0, excess / self._tokens_per_s) if self._tokens_per_s and self.running_tokens else 0.0


def _check_deadline(wait_s: float, left_s: float, expected: Expected) -> None:
    """Expired where a deadline cannot be met; with a hint when to try again, unless that would change nothing."""
    begin_s, deadline = wait_s + expected.ttft_s, f"the deadline is in {left_s:.1f} s: not begun"
    if expected.idle_ttft_s > left_s:
        raise Expired(f"the first token takes about {expected.idle_ttft_s:.1f} s with nothing ahead, and {deadline}")
    if expected.finish_s > CLEARLY * left_s:
        raise Expired(f"the answer takes about {expected.finish_s:.1f} s at least, and {deadline}")
    if begin_s > left_s:
        queue = f"about {wait_s:.1f} s of requests wait ahead"
        first = f", the first token then takes about {expected.ttft_s:.1f} s" if expected.ttft_s else ""
        error = Expired(f"{queue}{first}, and {deadline}")
        error.retry_after_s = begin_s - left_s
        raise error

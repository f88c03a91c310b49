"""Who gets pages, and from whom: new requests, growth by page, preemption to host memory and back.

Room for a page is looked for in this order: free pages, pages that are only cached, pages that others have reserved and
not reached, and last the pages of the request that comes last in order (its class of priority, then its age), which
are moved to host memory as they are and come back before anything that came later gets its pages.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from ..proto.errors import Exhausted, InvalidRequest
from ..worker.step_plan import SequenceId, SequencePlan
from .pool.base import KvPool, SavedPages
from .scheduler import DecodeScheduler, State
from .sequence import DecodeSequence


class PageManager:
    """Moves requests between waiting, pool and host memory. The engine thread alone uses it.

    Page ownership: a request's pages are the pool's from their allocation on, or the `SavedPages` here while it is
    preempted; `free` frees either.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        pool: KvPool,
        sequences: dict[SequenceId, DecodeSequence],
        *,
        headroom_tokens: int,
        host_bytes: int,
        max_tokens: Callable[[DecodeSequence], int],
        counters: Counter[str],
    ) -> None:
        """`max_tokens`: that a request can come to hold."""
        self._scheduler, self._pool, self._sequences = scheduler, pool, sequences
        self._headroom, self._host_bytes = headroom_tokens, host_bytes
        self._max_tokens = max_tokens
        self._saved: dict[SequenceId, SavedPages] = {}
        self._counters = counters

    @property
    def saved_bytes(self) -> int:
        """Of preempted requests, in host memory."""
        return sum(saved.nbytes for saved in list(self._saved.values()))

    def allocate_waiting(self) -> list[DecodeSequence]:
        """Gives pages to those that wait, in order, as far as there are; returns the new ones among them."""
        allocated = []
        for sequence_id in self._scheduler.queue():
            sequence = self._sequences[sequence_id]
            if not self._scheduler.is_promised(sequence_id) or not self._allocate(sequence):
                break
            if self._scheduler.state(sequence_id) is State.WAITING:
                allocated.append(sequence)
                self._counters["prefix_hit_tokens"] += sequence.cached_tokens
                self._counters["prompt_tokens"] += len(sequence.prompt)
            self._scheduler.mark_allocated(sequence_id)
        return allocated

    def allocate_step(self, plans: Sequence[SequencePlan]) -> list[SequencePlan]:
        """What of a step can be made: each request has the pages for its tokens. The others try again next time."""
        made: list[SequencePlan] = []
        for plan in plans:
            sequence = self._sequences[plan.sequence]
            while sequence.id not in self._saved:
                if self._pool.extend(sequence, plan.end):
                    made.append(plan)
                    break
                if not self._trim() and not self._preempt(self._scheduler.victims()):
                    break
        return [plan for plan in made if plan.sequence not in self._saved]

    def free(self, sequence: DecodeSequence) -> None:
        """Frees what a request holds, wherever that is."""
        self._pool.free(sequence)
        self._saved.pop(sequence.id, None)

    def _allocate(self, sequence: DecodeSequence) -> bool:
        """Puts a request into the pool, if need be in the place of requests of a lower class."""
        needed = self._pool.pages_for(self._reserved_tokens(sequence))
        while self._scheduler.has_slot():
            if self._take_pages(sequence):
                return True
            if self._pool.free_pages + self._spare_pages() < needed or not self._trim():
                break
        victims = self._scheduler.victims(of=sequence.id)
        if self._pool.free_pages + sum(self._pool.pages_of(self._sequences[victim]) for victim in victims) < needed:
            return False
        while self._preempt(victims):
            if self._scheduler.has_slot() and self._take_pages(sequence):
                return True
            victims = self._scheduler.victims(of=sequence.id)
        return False

    def _take_pages(self, sequence: DecodeSequence) -> bool:
        saved, tokens = self._saved.get(sequence.id), self._reserved_tokens(sequence)
        if saved is None:
            return self._pool.allocate(sequence, tokens, self._max_tokens(sequence))
        if not self._pool.restore(sequence, saved, tokens):
            return False
        del self._saved[sequence.id]
        self._counters["resumed"] += 1
        return True

    def _reserved_tokens(self, sequence: DecodeSequence) -> int:
        """Tokens that a request gets pages for before it is stepped."""
        if not self._host_bytes:
            return self._max_tokens(sequence)
        return min(sequence.length + self._headroom, self._max_tokens(sequence))

    def _holders(self) -> list[DecodeSequence]:
        """Those that have pages to give: none where all of them were promised at once."""
        return [self._sequences[holder] for holder in self._scheduler.holders()] if self._host_bytes else []

    def _spare_pages(self) -> int:
        """That requests have reserved and not reached."""
        return sum(self._pool.pages_of(holder) - self._pool.pages_for(holder.length) for holder in self._holders())

    def _trim(self) -> bool:
        """Frees what a request has reserved and not reached, of the last in order that has; whether one had."""
        return any(self._pool.trim(holder, holder.length) for holder in self._holders())

    def _preempt(self, victims: Sequence[SequenceId]) -> bool:
        """Moves the pages of the first of these that has room in host memory there; whether there was one."""
        for victim in (self._sequences[victim] for victim in victims):
            if victim.computed < len(victim.prompt):
                continue  # it is filling pages that it has, and needs no more until its prompt is done
            if self.saved_bytes + self._pool.saved_bytes(victim) > self._host_bytes:
                continue
            self._saved[victim.id] = self._pool.save(victim)
            self._pool.free(victim)
            self._scheduler.mark_preempted(victim.id)
            self._counters["preemptions"] += 1
            self._counters["preempted_bytes"] += self._saved[victim.id].nbytes
            return True
        return False


def check_fits(tokens: int, *, room: int, waiting: int, max_waiting: int) -> None:
    """InvalidRequest for a request that can never fit into a pool of `room` tokens; Exhausted where `waiting` others
    are too many already."""
    if tokens > room:
        raise InvalidRequest(
            f"prompt and new tokens come to {tokens}; this worker holds at most {room}: ask for fewer max_tokens"
        )
    if waiting >= max_waiting:
        raise Exhausted(f"{waiting} requests wait here already; try again later")

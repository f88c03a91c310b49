"""Who gets pages, and from whom: admission, growth by page, preemption to host memory and back.

Room for a page is looked for in this order: free pages, pages that are only cached, pages that others have reserved and
not reached, and last the pages of the request that comes last in order (its class of priority, then its age), which
are moved to host memory as they are and come back before anything that came later is admitted.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from .pool.base import KvStore
from .pool.saved import SavedPages
from .sequences.scheduler import DecodeScheduler, SequenceId, State
from .sequences.sequence import Advance, DecodeSequence


class Admission:
    """Moves requests between waiting, pool and host memory. The engine thread alone uses it.

    Page ownership: a request's pages are the store's from its admission on, or the `SavedPages` here while it is
    preempted; `release` frees either.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        store: KvStore,
        sequences: dict[SequenceId, DecodeSequence],
        *,
        headroom_tokens: int,
        host_bytes: int,
        tokens_at_most: Callable[[DecodeSequence], int],
        counters: Counter[str],
    ) -> None:
        self._scheduler, self._store, self._sequences = scheduler, store, sequences
        self._headroom, self._host_bytes = headroom_tokens, host_bytes
        self._tokens_at_most = tokens_at_most
        self._saved: dict[SequenceId, SavedPages] = {}
        self._counters = counters

    @property
    def saved_bytes(self) -> int:
        """Of preempted requests, in host memory."""
        return sum(saved.nbytes for saved in list(self._saved.values()))

    def admit(self) -> list[DecodeSequence]:
        """Gives pages to those that wait, in order, as far as there are; returns the new ones among them."""
        admitted = []
        for sequence_id in self._scheduler.queue():
            sequence = self._sequences[sequence_id]
            if not self._scheduler.is_promised(sequence_id) or not self._place(sequence):
                break
            if self._scheduler.state(sequence_id) is State.WAITING:
                admitted.append(sequence)
                self._counters["prefix_hit_tokens"] += sequence.held
                self._counters["prompt_tokens"] += len(sequence.prompt)
            self._scheduler.admitted(sequence_id)
        return admitted

    def release(self, sequence: DecodeSequence) -> None:
        """Frees what a request holds, wherever that is."""
        self._store.release(sequence)
        self._saved.pop(sequence.id, None)

    def with_room(self, work: Sequence[Advance]) -> list[Advance]:
        """What of a step can be made: each request has the pages for its tokens. The others try again next time."""
        made: list[Advance] = []
        for advance in work:
            sequence = advance.sequence
            while sequence.id not in self._saved:
                if self._store.grow(sequence, advance.end):
                    made.append(advance)
                    break
                if not self._trim() and not self._preempt(self._scheduler.victims()):
                    break
        return [advance for advance in made if advance.sequence.id not in self._saved]

    def _place(self, sequence: DecodeSequence) -> bool:
        """Puts a request into the pool, if need be in the place of requests of a lower class."""
        needed = self._store.pages_for(self._reserve(sequence))
        while self._scheduler.has_slot():
            if self._take_pages(sequence):
                return True
            if self._store.free + self._spare() < needed or not self._trim():
                break
        victims = self._scheduler.victims(of=sequence.id)
        if self._store.free + sum(self._store.pages_of(self._sequences[victim]) for victim in victims) < needed:
            return False
        while self._preempt(victims):
            if self._scheduler.has_slot() and self._take_pages(sequence):
                return True
            victims = self._scheduler.victims(of=sequence.id)
        return False

    def _take_pages(self, sequence: DecodeSequence) -> bool:
        saved = self._saved.get(sequence.id)
        if saved is None:
            return self._store.admit(sequence, self._reserve(sequence), self._tokens_at_most(sequence))
        if not self._store.restore(sequence, saved, self._reserve(sequence)):
            return False
        del self._saved[sequence.id]
        self._counters["resumed"] += 1
        return True

    def _reserve(self, sequence: DecodeSequence) -> int:
        """Tokens that a request gets pages for before it is stepped."""
        if not self._host_bytes:
            return self._tokens_at_most(sequence)
        return min(sequence.length + self._headroom, self._tokens_at_most(sequence))

    def _holders(self) -> list[DecodeSequence]:
        """Those that have pages to give: none where all of them were promised at once."""
        return [self._sequences[holder] for holder in self._scheduler.holders()] if self._host_bytes else []

    def _spare(self) -> int:
        """Pages that requests have reserved and not reached."""
        return sum(self._store.pages_of(holder) - self._store.pages_for(holder.length) for holder in self._holders())

    def _trim(self) -> bool:
        """Takes back what a request has reserved and not reached, of the last in order that has; whether one had."""
        return any(self._store.trim(holder, holder.length) for holder in self._holders())

    def _preempt(self, victims: Sequence[SequenceId]) -> bool:
        """Moves the pages of the first of these that has room in host memory there; whether there was one."""
        for victim in (self._sequences[victim] for victim in victims):
            if victim.computed < len(victim.prompt):
                continue  # it is filling pages that it has, and needs no more until its prompt is done
            if self.saved_bytes + self._store.saved_bytes(victim) > self._host_bytes:
                continue
            self._saved[victim.id] = self._store.save(victim)
            self._store.release(victim)
            self._scheduler.preempted(victim.id)
            self._counters["preemptions"] += 1
            self._counters["preempted_bytes"] += self._saved[victim.id].nbytes
            return True
        return False

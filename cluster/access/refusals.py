"""What becomes of callers who are not let in, whatever door they come to: counted, written down, and slowed."""

import asyncio
import time

from ..logs.audit import audit
from .access import Access
from .caller import Refused
from .peers import PeerFailures


class Refusals:
    """Of one gateway, for all of its doors: an address that fails at one has failed at each."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._failures = PeerFailures()

    async def note(self, refused: Refused, peer: str, what: str) -> None:
        """Counts a refusal of an address (`peers.py`) and returns when it may be told."""
        self._access.refused[refused.reason] += 1
        wait_s = self._failures.failed(peer, time.monotonic())
        if not self._failures.is_noisy(peer):
            audit("refused", who=peer, what=what, reason=refused.reason, key_id=refused.key_id)
        if wait_s:
            self._failures.held += 1
            try:
                await asyncio.sleep(wait_s)
            finally:
                self._failures.held -= 1

"""Whether engines die of a request: what one request has seen of workers that failed while they computed it. Pure.

A request that was in the step in which an engine failed is tried once more, in steps of its own, so that the others of
that step are safe; one that fails such a step too has shown that it is the reason. A process may also die without
saying anything: a request that loses one worker after the other, without progress, is treated in the same way, only
later, because workers are killed for other reasons too.
"""

from dataclasses import dataclass

from ...proto.errors import Blamed, EngineFailed, IsthmusError, Lost

LOSSES = 3  # of workers in a row, unexplained and without a new token, until it is tried alone
ALONE_LOSSES = 2  # and then, until it is blamed
ALONE_TOKENS = 2  # new ones of an answer that show that it goes on (`decode/scheduler.py`)


@dataclass
class Suspicion:
    """Of one request, over all its attempts."""

    alone: bool = False  # its next attempt is to be made in steps of its own
    _tokens: int = 0  # of its output, when an attempt failed last
    _losses: int = 0  # in a row
    _alone_losses: int = 0  # of these, in steps of its own

    def failed(self, request_id: str, error: IsthmusError, tokens: int) -> None:
        """Takes in why an attempt failed with so many tokens of output there. Blamed where that is the request."""
        new, self._tokens = tokens - self._tokens, tokens
        if new > ALONE_TOKENS or (new and not self.alone):
            self._losses = self._alone_losses = 0
        if isinstance(error, EngineFailed):
            if self.alone and error.participants == 1 and new <= ALONE_TOKENS:
                raise Blamed(
                    f"request {request_id} is not tried again: an engine failed in a step with it, and another one in "
                    f"a step that computed nothing else: {error}"
                )
            self.alone = True
        elif isinstance(error, Lost):
            self._losses += 1
            self._alone_losses += self.alone
            if self._alone_losses >= ALONE_LOSSES and self._losses > LOSSES:
                raise Blamed(
                    f"request {request_id} is not tried again: {self._losses} workers in a row were lost over it, the "
                    f"last {self._alone_losses} in steps of its own: {error}"
                )
            self.alone = self.alone or self._losses >= LOSSES

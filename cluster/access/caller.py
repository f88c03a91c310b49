"""Who makes a call: what the interceptor found out, for the handlers of the same call."""

from contextvars import ContextVar
from dataclasses import dataclass

from ...proto.errors import Unauthenticated
from .settings import NO_LIMITS, Limits


class Refused(Unauthenticated):
    """A caller who is not let in; `reason` is what it is counted as, `key_id` of a key that is known."""

    def __init__(self, reason: str, text: str, key_id: str = "") -> None:
        super().__init__(text)
        self.reason, self.key_id = reason, key_id


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    name: str  # in logs: "key 1f3a...", "token of alice"
    tenant: str | None  # None: whatever its requests say
    limits: Limits = NO_LIMITS
    account: str = ""  # what its requests are counted under; "": not counted


ANYBODY = Caller(name="anonymous", tenant=None)

calling: ContextVar[Caller | None] = ContextVar("calling", default=None)  # of the call in whose handler one is

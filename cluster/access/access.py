"""Who may ask a gateway, as whom, and how much: keys, tokens and limits in one place, for one event loop.

access = Access(settings)
await access.start(tasks)               # reads its files, and follows them
access.authenticate(metadata)           # -> Caller, or raises Refused: the interceptor
access.caller()                         # in a handler: who makes this very call
with access.running(caller) as permit:  # a request of it, from its beginning to its end
    ...
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ...proto.common_pb2 import Priority
from ...proto.errors import InvalidRequest, IsthmusError, PermissionDenied, Unauthenticated, shown
from ...proto.priority import rank_of
from ...proto.rpc.addresses import parse_address
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import AccessStatus
from . import key_file, tokens
from .caller import ANYBODY, Caller, Refused, calling
from .settings import NO_LIMITS, OTHERS, PRIORITIES, AccessSettings, Limits
from .usage import Accounts, Allowance, OverLimit, Permit, reserve_for_job
from .watched_file import WatchedFile

log = logging.getLogger(__name__)

REFRESH_S = 1.0  # between looks at the files: so long a key that was revoked may still be let in
NO_KEY_WAIT_S = 5.0  # between looks for a valid key of a tenant whose job waits for one
MAX_CREDENTIALS = 7_000  # characters; of all metadata together gRPC refuses 8 KiB at random
SEND = "send authorization: Bearer KEY (isthmus: ISTHMUS_API_KEY, or --api-key)"


class Claimed(NamedTuple):
    """What a request may go on as."""

    tenant: str
    priority: Priority.ValueType


class Access:
    """Belongs to one gateway and its event loop."""

    def __init__(self, settings: AccessSettings) -> None:
        self._settings = settings
        self._keys = self._tokens = None
        if settings.keys_file is not None:
            self._keys = WatchedFile(settings.keys_file, key_file.parse_table, key_file.MAX_BYTES)
        if settings.jwt.jwks_file is not None:
            self._tokens = WatchedFile(settings.jwt.jwks_file, tokens.parse_key_set, tokens.MAX_BYTES)
        self._accounts = Accounts()
        self.refused: Counter[str] = Counter()  # calls, by reason

    async def start(self, tasks: Tasks) -> None:
        """Reads the files of keys and follows them as one of `tasks`. A file that cannot be read is no error: nobody is
        let in until it can be."""
        if self._settings.guarded:
            await asyncio.to_thread(self.refresh)
            tasks.start("access", self._follow)

    def refresh(self) -> None:
        """Reads what has changed; blocks."""
        for file in (self._keys, self._tokens):
            if file is not None:
                file.refresh()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await asyncio.to_thread(self.refresh)

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who sends this metadata. Refused where that is nobody who may ask."""
        if not self._settings.guarded:
            return ANYBODY
        credentials = _bearer(metadata)
        if self._tokens is not None and credentials.count(".") == 2:  # no API key has a dot
            if self._tokens.content is None:
                raise Refused("unreadable", "no token is valid here now; `isthmus status` says why")
            return tokens.verify(credentials, self._tokens.content, self._settings.jwt)
        if self._keys is None:
            raise Refused("unknown", "this is not a valid token")
        if self._keys.content is None:
            raise Refused("unreadable", "no API key is valid here now; `isthmus status` says why")
        record = self._keys.content.verify(credentials)
        return Caller(name=f"key {record.id}", tenant=record.tenant, limits=record.limits, account=f"key {record.id}")

    def caller(self) -> Caller:
        """Who makes the call in whose handler this is; Unauthenticated where nobody has looked."""
        if not self._settings.guarded:
            return ANYBODY
        if (caller := calling.get()) is None:
            raise Unauthenticated("nobody has looked who makes this call")
        return caller

    def claimed(self, tenant: str, priority: Priority.ValueType) -> Claimed:
        """The tenant and priority of a request of this call's caller. PermissionDenied where it asks for another's, or
        for more than it may have. A priority that is not said is standard, or less where that is too much."""
        caller = self.caller()
        if caller.tenant is None:
            return Claimed(tenant, priority)
        if tenant not in ("", caller.tenant):
            self.refused["tenant"] += 1
            raise PermissionDenied(
                f"you ask as another tenant ({shown(tenant)}); allowed: {shown(caller.tenant)}, or none"
            )
        most = PRIORITIES[caller.limits.max_priority]
        if rank_of(priority) >= rank_of(most):
            return Claimed(caller.tenant, priority)
        if not priority:
            return Claimed(caller.tenant, most)
        self.refused["priority"] += 1
        raise PermissionDenied(f"your largest priority is {caller.limits.max_priority}")

    def allowance(self) -> dict[str, Allowance]:
        """What is left to this call's caller of requests and tokens in a minute; nothing where it has no such limit."""
        caller = self.caller()
        return self._accounts.left(caller.account, caller.limits, time.monotonic())

    def own_tenant(self) -> str | None:
        """The tenant whose things this call's caller may see; None: everybody's."""
        return self.caller().tenant

    @contextlib.contextmanager
    def running(self, caller: Caller) -> Iterator[Permit]:
        """Around a request, from before anything is computed for it. What ends with an error before any output has used
        no tokens. OverLimit where the caller has used up a limit, here or when tokens are reserved."""
        refused = False
        with self._counted():
            permit = self._accounts.enter(caller.account, caller.limits, time.monotonic())
        try:
            with self._counted():
                yield permit
        except IsthmusError:
            refused = True
            raise
        finally:
            permit.close(time.monotonic(), refused=refused)

    def begin_job(self, tenant: str, prompt_tokens: int, most_output: int) -> Permit | float:
        """A request of a job of this tenant begins, or has to wait for so many seconds.

        Jobs are counted beside their tenant's keys, with the widest limits of these: a job outlives the key that it was
        submitted with. A tenant that has no valid key any more waits until it has one.
        """
        limits = self.limits_of(tenant)
        if limits is None:
            return NO_KEY_WAIT_S
        now_s = time.monotonic()
        try:
            permit = self._accounts.enter(f"jobs of {tenant}", limits, now_s)
        except OverLimit as error:
            return error.retry_after_s or NO_KEY_WAIT_S
        if wait_s := reserve_for_job(permit, prompt_tokens, most_output, now_s):
            permit.close(now_s, refused=True)
            return wait_s
        return permit

    def limits_of(self, tenant: str) -> Limits | None:
        """What a tenant's jobs may have; None where nothing that is valid now speaks for it.

        Any time: a job has a deadline of its own, and one that is cut off would only be tried again.
        """
        if not self._settings.guarded:
            return NO_LIMITS
        found = self._keys.content.limits_of(tenant) if self._keys is not None and self._keys.content else None
        if found is None and self._tokens is not None:
            tenants = self._settings.jwt.tenants
            found = tenants.get(tenant, tenants.get(OTHERS))
        return None if found is None else found.model_copy(update={"max_request_s": None})

    def fill_status(self, status: AccessStatus) -> None:
        """Says who may ask and who was refused."""
        status.mode = self.mode
        if self._keys is not None and self._keys.content is not None:
            status.keys = self._keys.content.valid()
        status.problems.extend(file.problem for file in (self._keys, self._tokens) if file is not None and file.problem)
        for reason, count in self.refused.items():
            status.refused[reason] = count

    @property
    def mode(self) -> str:
        """ "loopback", "anonymous", or what a caller must show."""
        if not self._settings.guarded:
            return "anonymous" if self._settings.anonymous else "loopback"
        shown = [name for name, file in (("keys", self._keys), ("jwt", self._tokens)) if file is not None]
        return ", ".join(shown)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except OverLimit as error:
            self.refused[error.reason] += 1
            raise


def check_listen(settings: AccessSettings, address: str) -> None:
    """InvalidRequest where others than this host could ask with no key or token, and nobody has said that they may."""
    if settings.guarded or settings.anonymous or parse_address(address).is_loopback:
        return
    raise InvalidRequest(
        f"on {address} everybody could ask, since no API keys are set: make one (isthmus keys add --keys-file FILE "
        "--tenant NAME) and start with --keys-file FILE, or set gateway.access.jwt; or listen on 127.0.0.1; "
        "gateway: {access: {anonymous: true}} lets everybody in"
    )


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What stands behind the one `authorization: Bearer`. Refused where it is not that."""
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        raise Refused("missing", f"no API key or token: {SEND}")
    scheme, _, credentials = values[0].partition(" ") if isinstance(values[0], str) else ("", "", "")
    credentials = credentials.strip(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not 1 <= len(credentials) <= MAX_CREDENTIALS:
        raise Refused("malformed", f"this is no key or token: {SEND}")
    return credentials

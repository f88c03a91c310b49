"""What stands before all handlers: who asks, under which id, and how it ended, whatever ended it."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...proto.errors import InvalidRequest, IsthmusError
from ...proto.rpc.limits import MAX_METADATA_BYTES
from ...proto.rpc.statuses import status_of_bug
from .auth import authenticate
from .call import name_in
from .door import Door
from .errors import CLIENT_GONE, OPENAI, ClientGone, Dialect, response_of

log = logging.getLogger(__name__)

_LINGER_S = 1.0


class Guard:
    """Gives every request an id, a line of the log and a bounded end. Outermost."""

    def __init__(self, app: ASGIApp, quiet: frozenset[str], dialects: Mapping[str, Dialect]) -> None:
        """`quiet`: paths of which no line is written, for probes ask them all the time. `dialects`: of paths, and of
        all below them, that have one of their own."""
        self._app, self._quiet, self._dialects = app, quiet, dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        dialect = scope["state"]["dialect"] = self._dialect_of(scope["path"])
        answer = _Answer(scope, receive, send)
        began_s = time.monotonic()
        try:
            scope["state"]["request_id"] = answer.request_id = _request_id(scope)
            _check_head(scope)
            await self._app(scope, answer.receive, answer.send)
        except InvalidRequest as error:
            await response_of(error, dialect)(scope, answer.receive, answer.send)
        except ClientGone:
            answer.gone()
        except asyncio.CancelledError:
            answer.gone()  # the server stops; uvicorn would log a trace
        except Exception as error:  # a bug: told and logged by then (`errors.py`) where its answer is whole
            if not answer.complete:
                status_of_bug(error, "an answer over HTTP")
                answer.gone()
                answer.status = 500
        finally:
            if scope["path"] not in self._quiet:
                answer.log(time.monotonic() - began_s)

    def _dialect_of(self, path: str) -> Dialect:
        found = (each for own, each in self._dialects.items() if f"{path}/".startswith(f"{own}/"))
        return next(found, OPENAI)


class _Answer:
    """Follows the answer of one request on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.request_id, self.status, self.complete = "", 0, False
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._read = not has_body or "expect" in headers  # whether all of the request's body was; who expects waits

    async def receive(self) -> Message:
        message = await self._receive()
        self._read = self._read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            if self.request_id:
                for name in ("x-request-id", self._scope["state"]["dialect"].request_id):
                    headers[name] = self.request_id
            if not self._read:  # what comes of it still would be taken for the next request
                headers["connection"] = "close"
        elif not message.get("more_body", False):
            if not self._read:
                await self._send({**message, "more_body": True})
                await self._linger()
                message = {**message, "body": b""}
            self.complete = True
        await self._send(message)

    async def _linger(self) -> None:
        """Takes in what the client sends still, and forgets it: a connection that is closed on it is reset, and the
        client never sees the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self._read:
                    await self.receive()

    def gone(self) -> None:
        """Ends the connection where its answer cannot be completed."""
        if not self.complete:
            self.status = CLIENT_GONE
            self._scope["state"]["connection"].abort()

    def log(self, took_s: float) -> None:
        scope = self._scope
        fields = {
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            "status": self.status,
            "ms": round(took_s * 1e3, 1),
            "request_id": self.request_id,
        }
        log.info("answered over HTTP", extra={"fields": fields})


class Entrance:
    """Lets in who may ask, before anything of the request's body is read. Inside of CORS, which has no keys."""

    def __init__(self, app: ASGIApp, door: Door, open_paths: frozenset[str], cluster: str) -> None:
        self._app, self._door, self._open, self._cluster = app, door, open_paths, cluster

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._open:
            try:
                await authenticate(self._door, scope, self._cluster)
            except IsthmusError as error:
                await response_of(error, scope["state"]["dialect"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check_head(scope: Scope) -> None:
    """InvalidRequest for what h11 lets through: a head that came at once, however large, and a body that ends at two
    places, of which a proxy in front may have taken the other."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(f"path and headers of {size} bytes; allowed: at most {MAX_METADATA_BYTES}")
    headers = Headers(scope=scope)
    if "content-length" in headers and "transfer-encoding" in headers:
        raise InvalidRequest("content-length and transfer-encoding are both set; allowed: one of them")


def _request_id(scope: Scope) -> str:
    """The client's own, or one that is drawn; InvalidRequest where it cannot be one."""
    return name_in(Headers(scope=scope), "x-request-id") or secrets.token_hex(12)

"""One HTTP request on its way through the door: what a handler is given, and what it answers a request with.

async def handle(call: Call) -> Response:
    body = await call.body(MyRequest)                   # BadField, BodyTooLarge, ...
    request = call.generate_request(prompt="...")       # with the request's id, tenant, `explain`
    async with call.alive():                            # ends with ClientGone, or Expired at x-request-timeout
        await call.answer(request, write)               # write(GenerateEvent); raises the IsthmusError that ended it
    return call.json({...})

A stream is an `EventStream` (`sse.py`), which does the same once its first event is there.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...proto.errors import Expired, InvalidRequest
from ...proto.generation_pb2 import GenerateRequest
from ...proto.names import check_name
from ...proto.rpc.timeouts import MAX_TIMEOUT_S
from ...proto.rpc.trace import TraceContext, trace_of
from ..access.caller import calling
from ..requests.attempt import PassOn
from ..requests.request import ResolvedRequest
from .body import parse_body, read_body
from .door import Door
from .errors import BadField, ClientGone, Dialect

M = TypeVar("M", bound=BaseModel)

TIMEOUT = "x-request-timeout"  # seconds
EXPLAIN = "x-isthmus-explain"  # "true": timings, and what the router chose from
TENANT = "x-isthmus-tenant"


class Call:
    """A request that was let in."""

    def __init__(self, door: Door, request: Request) -> None:
        """BadField where a header is none that it may be."""
        self.door, self.request = door, request
        self.request_id: str = request.state.request_id
        self.dialect: Dialect = request.state.dialect
        self.arrived_s = time.monotonic()
        self.explain = _flag(request, EXPLAIN)
        self.tenant = name_in(request.headers, TENANT)
        self.trace: TraceContext = trace_of(request.headers.items())
        timeout_s = _timeout_s(request)
        self._deadline_s = None if timeout_s is None else self.arrived_s + timeout_s
        self._fields: dict[str, str] = {}
        request.state.fields = self._fields
        request.state.allowance = self._allowance  # for answers that are made elsewhere, of errors

    async def body(self, model: type[M]) -> M:
        """What was sent, as this model; raises as `read_body` and `parse_body`."""
        config, scope = self.door.config, self.request.scope
        self.name_fields(**{name: name for name in model.model_fields})
        body = await read_body(scope, self.request.receive, config.max_body_bytes)
        return parse_body(model, scope, body, strict_fields=config.strict_fields)

    def name_fields(self, **fields: str) -> None:
        """Says how errors from below call what the request has under another name: `grammar="response_format"`."""
        self._fields |= fields

    def generate_request(self, number: int | None = None, **fields: Any) -> GenerateRequest:
        """A request to the model with what the call's headers say; `number`: of several that one call makes."""
        request_id = self.request_id if number is None else f"{self.request_id[:100]}-{number}"
        return GenerateRequest(request_id=request_id, tenant=self.tenant, explain=self.explain, **fields)

    def time_left(self) -> float | None:
        """Seconds to the deadline; None: there is none."""
        return None if self._deadline_s is None else self._deadline_s - time.monotonic()

    async def answer(
        self, request: GenerateRequest, write: PassOn, accepted: Callable[[ResolvedRequest], object] | None = None
    ) -> None:
        """Answers a request to the model, within `alive`; raises the IsthmusError that ended it. `accepted` is told
        what it was resolved to, before the first event."""

        async def told(resolved: ResolvedRequest) -> None:
            if accepted is not None:
                accepted(resolved)

        await self.door.answer(request, write, told, time_left=self.time_left, trace=self.trace)

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Around all that is done for the client: Expired where its deadline passes, ClientGone where it goes away."""
        async with _until_gone(self.request):
            try:
                async with asyncio.timeout(self.time_left()):
                    yield
            except TimeoutError:
                raise Expired("the deadline passed before the answer was complete") from None

    def json(self, content: Any, status: int = 200) -> Response:
        """A whole answer."""
        return JSONResponse(content, status, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        """That every answer of this call has: what its caller may ask still, where there are limits."""
        return self._allowance()

    def _allowance(self) -> dict[str, str]:
        if calling.get() is None:  # of a path that is open to everybody: nobody has looked who asks
            return {}
        return self.dialect.allowance(self.door.access.allowance())


def name_in(headers: Mapping[str, str], header: str) -> str:
    """The name that a header has, "" where it has none; BadField where it is too long, or not ASCII: clients send other
    characters in encodings that nothing tells."""
    name = headers.get(header, "")
    if not name.isascii():
        raise BadField(f"{header} has a character that is not ASCII; allowed: ASCII", header)
    try:
        return check_name(header, name)
    except InvalidRequest as error:
        raise BadField(str(error), header) from None


@contextlib.asynccontextmanager
async def _until_gone(request: Request) -> AsyncIterator[None]:
    """Ends the block with ClientGone where the client closes its connection. The request's body must have been read."""
    handler, gone = asyncio.current_task(), False
    assert handler is not None

    async def watch(task: "asyncio.Task[Any]") -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch(handler), name="watch for the client to go away")
    try:
        yield
    except asyncio.CancelledError:
        if gone and not handler.uncancel():
            raise ClientGone from None
        raise
    finally:
        watching.cancel()


def _flag(request: Request, name: str) -> bool:
    value = request.headers.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise BadField(f"{name} is not true or false", name)
    return value in ("true", "1")


def _timeout_s(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT)
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds <= MAX_TIMEOUT_S:
            return seconds
    raise BadField(f"{TIMEOUT} is not a number of seconds; allowed: above 0, at most {MAX_TIMEOUT_S:.0f}", TIMEOUT)

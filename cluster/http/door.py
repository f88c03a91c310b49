"""What the gateway gives its HTTP door, and what each path of the door is."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel
from starlette.responses import Response

from ...proto.generation_pb2 import GenerateRequest, Model
from ...proto.rpc.trace import TraceContext
from ..access.access import Access
from ..access.refusals import Refusals
from ..http_config import HttpConfig
from ..requests.attempt import PassOn
from ..requests.dispatch import TimeLeft
from ..requests.request import ResolvedRequest
from ..text.served import ServedModel
from .errors import OPENAI, Dialect

if TYPE_CHECKING:
    from .call import Call


class Answer(Protocol):
    """Answers one request of the caller (`frontend/answering.py`)."""

    def __call__(
        self,
        request: GenerateRequest,
        write: PassOn,
        accepted: Callable[[ResolvedRequest], Awaitable[None]],
        *,
        time_left: TimeLeft,
        trace: TraceContext = (),
    ) -> Awaitable[None]: ...


@dataclass(frozen=True, kw_only=True)
class Door:
    """The gateway, as handlers of HTTP requests see it."""

    answer: Answer
    model: ServedModel
    describe: Callable[[str], Model]  # the model of that name ("": the one); NotFound
    can_serve: Callable[[], bool]  # whether a new request would be taken now
    access: Access
    refusals: Refusals
    config: HttpConfig
    started_unix_s: int


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One operation of the API: a path, who answers it, and what goes in and out."""

    method: str
    path: str
    summary: str
    handle: "Callable[[Call], Awaitable[Response]]"
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None  # of its stream, where the request asks for one
    open: bool = False  # answered to everybody, as probes have no keys
    documented: bool = True  # in the OpenAPI document
    dialect: Dialect = OPENAI  # of this path and what is below it
    errors: tuple[int, ...] = ()  # statuses of its own, beside those of every endpoint

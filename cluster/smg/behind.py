"""What the servicer needs of the gateway that it is served by."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from ...proto.generation_pb2 import GenerateRequest, Model
from ...proto.rpc.trace import TraceContext
from ...proto.worker_pb2 import WorkerReport
from ..requests.attempt import PassOn
from ..requests.dispatch import TimeLeft
from ..requests.request import ResolvedRequest
from ..text.served import ServedModel


class Answer(Protocol):
    """`Answering.answer` (cluster/frontend/answering.py)."""

    async def __call__(
        self,
        request: GenerateRequest,
        write: PassOn,
        accepted: Callable[[ResolvedRequest], Awaitable[None]],
        /,
        *,
        time_left: TimeLeft,
        trace: TraceContext = (),
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Behind:
    """A gateway, as this door sees it."""

    answer: Answer
    model: ServedModel
    describe: Callable[[], Model]  # the model as the workers can serve it now
    reports: Callable[[], list[WorkerReport]]
    active: Callable[[], int]  # requests of the gateway that run or wait
    serving: Callable[[], bool]  # whether health is green

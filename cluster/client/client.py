"""A client of the public API that also measures what its user feels: TTFT, ITL and handover, at this end.

async with Client("127.0.0.1:50051") as client:
    answer = await client.answer(build_request(prompt="The sea is"), on_event=lambda e: print(e.text, end=""))
    print(answer.ttft_ms, answer.itl_ms, answer.handover_ms)

async with Client("127.0.0.1:50051", admin="127.0.0.1:50052") as client:
    print(await client.status())
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from ...proto.common_pb2 import FINISH_REASON_UNSPECIFIED, FinishReason, SamplingParams, TokenLogprobs
from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import (
    Chat,
    ChatMessage,
    GenerateEvent,
    GenerateRequest,
    GetModelRequest,
    Model,
    Timings,
    TokenIds,
    Usage,
)
from ...proto.generation_pb2_grpc import GenerationStub
from ...proto.rpc.transport import Channel, Transport
from ...proto.worker_pb2 import ClusterStatus, Explanation, GetStatusRequest
from ...proto.worker_pb2_grpc import ClusterStub
from .credentials import ApiKey, as_api_key, dial
from .security import client_security, server_role

if TYPE_CHECKING:
    from ...proto.worker_pb2_grpc import ClusterAsyncStub


def build_request(
    *,
    prompt: str | None = None,
    chat: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    sampling: Mapping[str, Any] | None = None,
    model: str = "",
    codec: str = "",
    continue_final_message: bool = False,
) -> GenerateRequest:
    """A request with one of the three inputs; `sampling` has fields of SamplingParams, None is unset.

    With `continue_final_message` the answer goes on where the chat's last message ends. InvalidRequest where a field of
    `sampling` cannot have its value.
    """
    set_sampling = {name: value for name, value in (sampling or {}).items() if value is not None}
    request = GenerateRequest(
        model=model,
        codec=codec,
        sampling=_sampling_params(set_sampling),
        continue_final_message=continue_final_message,
    )
    if prompt is not None:
        request.prompt = prompt
    if chat is not None:
        messages = [ChatMessage(role=message["role"], content=message["content"]) for message in chat]
        request.chat.CopyFrom(Chat(messages=messages))
    if token_ids is not None:
        request.tokens.CopyFrom(TokenIds(ids=token_ids))
    return request


def _sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    params = SamplingParams()
    for name, value in values.items():
        try:
            params.MergeFrom(SamplingParams(**{name: value}))
        except (TypeError, ValueError) as error:  # protobuf's own say of no field what is wrong with it
            raise InvalidRequest(f"{name} is {value!r}: {str(error).partition(':')[0].lower()}") from None
    return params


@dataclass(kw_only=True)
class Answer:
    """Everything that came for one request, with arrival times at this end."""

    sent_unix_ns: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    arrivals_unix_ns: list[int] = field(default_factory=list)  # one for each token
    finish_reason: FinishReason.ValueType = FINISH_REASON_UNSPECIFIED
    usage: Usage = field(default_factory=Usage)  # of all answers to the request
    timings: Timings = field(default_factory=Timings)
    stop_text: str = ""  # the stop string that ended it
    prompt_token_ids: list[int] = field(default_factory=list)  # where asked for; of the first answer only
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # the same, from the prompt's second token on

    def take(self, event: GenerateEvent, now_unix_ns: int) -> None:
        """Adds an event that arrived at `now_unix_ns`."""
        self.text += event.text
        self.token_ids.extend(event.token_ids)
        self.arrivals_unix_ns.extend([now_unix_ns] * len(event.token_ids))
        self.prompt_token_ids.extend(event.prompt_token_ids)
        self.prompt_logprobs.extend(event.prompt_logprobs)
        if event.finish_reason != FINISH_REASON_UNSPECIFIED:
            self.finish_reason, self.usage, self.timings = event.finish_reason, event.usage, event.timings
            self.stop_text = event.stop_text

    @property
    def finish(self) -> str:
        """Why it ended: "eos", "stop" or "length"."""
        return FinishReason.Name(self.finish_reason).removeprefix("FINISH_REASON_").lower()

    @property
    def ttft_ms(self) -> float | None:
        """From sending the request to the arrival of the first token."""
        return (self.arrivals_unix_ns[0] - self.sent_unix_ns) / 1e6 if self.arrivals_unix_ns else None

    @property
    def itl_ms(self) -> list[float]:
        """Time between each token and the one before."""
        times = self.arrivals_unix_ns
        return [(late - early) / 1e6 for early, late in pairwise(times)]

    @property
    def handover_ms(self) -> float | None:
        """From sampling the first token on the prefill worker to its arrival here, by the two hosts' clocks.

        None where the answer ended before the transfer's statistics came.
        """
        sampled_ns = self.timings.transfer.first_token_unix_ns
        return (self.arrivals_unix_ns[0] - sampled_ns) / 1e6 if sampled_ns and self.arrivals_unix_ns else None


class Client:
    """Calls one gateway, as an async context manager; raises grpc.aio.AioRpcError as the server sends it."""

    def __init__(
        self,
        address: str,
        transport: Transport | None = None,
        *,
        admin: str = "",
        api_key: ApiKey | str | None = None,
    ) -> None:
        """Dials through `transport`; by default one of its own, with the certificates that `client_security` finds.
        `admin`: host:port of the gateway's admin port, for status and orders.

        InvalidRequest where `api_key`, which the admin port never sees, would go to another host in plain text.
        """
        self.address, self.admin_address = address, admin
        self._transport = transport or Transport(client_security(address))
        self._channel = dial(address, self._transport, as_api_key(api_key))
        self._generation = GenerationStub(self._channel)
        self._admin_channel: Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()
        if self._admin_channel is not None:
            await self._admin_channel.close()

    @property
    def cluster(self) -> "ClusterAsyncStub":
        """Status and orders; InvalidRequest where the client was given no admin address."""
        if not self.admin_address:
            raise InvalidRequest("status and orders have a port of their own: Client(address, admin='host:port')")
        if self._admin_channel is None:
            self._admin_channel = self._transport.dial(self.admin_address, server_role(self.admin_address))
        return ClusterStub(self._admin_channel)

    async def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncIterator[GenerateEvent]:
        """The events of one request as they come. Leaving the loop early cancels the request."""
        call = self._generation.Generate(request, timeout=timeout_s)
        try:
            while isinstance(event := await call.read(), GenerateEvent):
                yield event
        finally:
            call.cancel()

    async def answer(
        self,
        request: GenerateRequest,
        *,
        on_event: Callable[[GenerateEvent], object] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Runs one request to its end; `on_event` sees each event at once. Of several answers it returns the first."""
        return (await self.answers(request, on_event=on_event, timeout_s=timeout_s))[0]

    async def answers(
        self,
        request: GenerateRequest,
        *,
        on_event: Callable[[GenerateEvent], object] | None = None,
        timeout_s: float | None = None,
    ) -> list[Answer]:
        """The same; returns all answers, `sampling.n` of them."""
        sent_ns = time.time_ns()
        answers = [Answer(sent_unix_ns=sent_ns) for _ in range(request.sampling.n or 1)]
        call = self._generation.Generate(request, timeout=timeout_s)
        try:
            while isinstance(event := await call.read(), GenerateEvent):
                answers[event.choice].take(event, time.time_ns())
                if event.HasField("usage"):
                    for answer in answers:
                        answer.usage = event.usage
                if on_event is not None:
                    on_event(event)
        finally:
            call.cancel()
        return answers

    async def model(self, name: str = "", *, timeout_s: float | None = 10) -> Model:
        """The model that the cluster serves."""
        return await self._generation.GetModel(GetModelRequest(name=name), timeout=timeout_s)

    async def explain(self, request: GenerateRequest, *, timeout_s: float | None = 10) -> Explanation:
        """What a request would cost where, and what the gateway would choose."""
        return await self.cluster.Explain(request, timeout=timeout_s)

    async def status(self, *, timeout_s: float | None = 10) -> ClusterStatus:
        """All workers as the gateway sees them."""
        return await self.cluster.GetStatus(GetStatusRequest(), timeout=timeout_s)

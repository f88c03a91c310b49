"""Lets in who may ask: before a request's message is looked at."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from .access import Access
from .caller import Refused, calling
from .peers import address_of
from .refusals import Refusals

# Probes of load balancers and kubelets have no keys. Reflection is for callers: it needs one, as all else does.
OPEN = frozenset({"grpc.health.v1.Health"})


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Stands behind the interceptor that makes statuses of errors (`proto/rpc/interceptor.py`)."""

    def __init__(self, access: Access, refusals: Refusals | None = None) -> None:
        """`refusals`: those of the gateway, where it has other doors too."""
        self._access = access
        self._refusals = refusals or Refusals(access)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """gRPC runs this and the handler in one task of the call: the handler sees what is set here, no other call."""
        method = handler_call_details.method
        if _service(method) not in OPEN:
            try:
                calling.set(self._access.authenticate(handler_call_details.invocation_metadata or ()))
            except Refused as error:
                return self._refusal(error, method)
        return await continuation(handler_call_details)

    def _refusal(self, refused: Refused, method: str) -> grpc.RpcMethodHandler:
        """Ends the call, whatever its kind, without reading what it sends."""

        async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
            await self._refusals.note(refused, address_of(context.peer()), method)
            raise refused

        return grpc.stream_stream_rpc_method_handler(refuse)


def _service(method: str) -> str:
    return method.removeprefix("/").partition("/")[0]

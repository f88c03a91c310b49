"""Lets in who may ask: before a request's message is looked at."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from ..logs.audit import audit
from .access import Access
from .caller import Refused, calling
from .peers import PeerFailures, address_of

# Probes of load balancers and kubelets have no keys. Reflection is for callers: it needs one, as all else does.
OPEN = frozenset({"grpc.health.v1.Health"})


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Stands behind the interceptor that makes statuses of errors (`proto/rpc/interceptor.py`)."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._failures = PeerFailures()

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
            self._access.refused[refused.reason] += 1
            peer = address_of(context.peer())
            wait_s = self._failures.failed(peer, time.monotonic())
            if not self._failures.is_noisy(peer):
                audit("refused", who=peer, what=method, reason=refused.reason, key_id=refused.key_id)
            if wait_s:
                self._failures.held += 1
                try:
                    await asyncio.sleep(wait_s)
                finally:
                    self._failures.held -= 1
            raise refused

        return grpc.stream_stream_rpc_method_handler(refuse)


def _service(method: str) -> str:
    return method.removeprefix("/").partition("/")[0]

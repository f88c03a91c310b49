"""The audit log of admin actions: who changed what of a running cluster, and how that ended."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict

from ...proto.errors import IsthmusError
from ...proto.rpc.statuses import code_of
from ...proto.security.identity import identities_of
from .audit import audit

ACTIONS = frozenset(f"/isthmus.v1.Cluster/{name}" for name in ("DrainWorker", "FlipWorker", "Scale"))


class AdminAudit(grpc.aio.ServerInterceptor):
    """For the server of the Cluster service: a line for each action that changes something, when it has ended."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in ACTIONS:
            return handler
        behaviour: Any = handler.unary_unary
        assert inspect.iscoroutinefunction(behaviour), "actions are asked once and answered once"
        action = handler_call_details.method.rpartition("/")[2]

        async def audited(request: Any, context: grpc.aio.ServicerContext) -> Any:
            outcome = "CANCELLED"
            try:
                answer = await behaviour(request, context)
                outcome = "OK"
                return answer
            except IsthmusError as error:
                outcome = code_of(error).name
                raise
            except Exception:
                outcome = "UNKNOWN"
                raise
            finally:
                audit("admin", who=who_calls(context), what=action, outcome=outcome, **_asked(request))

        return grpc.unary_unary_rpc_method_handler(audited, handler.request_deserializer, handler.response_serializer)


def who_calls(context: grpc.aio.ServicerContext) -> str:
    """The identity in the caller's certificate (isthmus://CLUSTER/ROLE/NAME), else "loopback" or its address."""
    if identities := identities_of(context.auth_context()):
        return str(identities[0])
    peer = context.peer()
    return "loopback" if peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")) else peer


def _asked(request: Any) -> dict[str, Any]:
    return MessageToDict(request, preserving_proto_field_name=True) if hasattr(request, "DESCRIPTOR") else {}

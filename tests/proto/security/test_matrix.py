"""Who may call what: every RPC of every service by everybody, and exactly the allowed ones succeed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from certified import SERVICES, believing, methods, outcome, security, transport
from google.protobuf.descriptor import ServiceDescriptor
from support.certificates import CLUSTER

from isthmus.proto.rpc.channel import Channel
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.authority import CALLERS
from isthmus.proto.security.certificates import make_ca

NOBODY, CLIENT, GATEWAY, SUPERVISOR = "no certificate", "client", "gateway", "supervisor"
PREFILL, DECODE, ADMIN = "prefill", "decode", "admin"
OTHER_CA, OTHER_CLUSTER = "every role, by another CA", "every role of another cluster, by the same CA"
ALL_ROLES = (GATEWAY, SUPERVISOR, PREFILL, DECODE, ADMIN, CLIENT)
EVERYBODY = {NOBODY, *ALL_ROLES, OTHER_CA, OTHER_CLUSTER}

# Of docs/security.md, by hand: the table of the code is what is tested.
MAY: dict[str, set[str]] = {
    "isthmus.v1.Generation": {CLIENT, ADMIN},
    "isthmus.v1.Jobs": {CLIENT, ADMIN},
    "vllm.grpc.engine.VllmEngine": {CLIENT, ADMIN},
    "isthmus.v1.Cluster": {ADMIN},
    "isthmus.v1.Supervisor": {GATEWAY, ADMIN},
    "isthmus.v1.Prefill": {DECODE},
    "isthmus.v1.Decode": {GATEWAY},
    "isthmus.v1.Worker": {GATEWAY, SUPERVISOR},
    "grpc.health.v1.Health": set(ALL_ROLES),
    "grpc.reflection.v1alpha.ServerReflection": set(ALL_ROLES),
}
PUBLIC = {
    "isthmus.v1.Generation",
    "isthmus.v1.Jobs",
    "vllm.grpc.engine.VllmEngine",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


def answering(service: ServiceDescriptor) -> Callable[[grpc.aio.Server], None]:
    """Adds a service whose every method answers an empty message."""

    async def unary(request: Any, context: Any) -> bytes:
        return b""

    async def stream(request: Any, context: Any) -> None:
        await context.write(b"")

    handlers = {
        method.name: grpc.unary_stream_rpc_method_handler(stream)  # pyright: ignore[reportArgumentType]
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler(unary)  # pyright: ignore[reportArgumentType]
        for method in service.methods
    }
    return lambda server: server.add_registered_method_handlers(service.full_name, handlers)


@asynccontextmanager
async def port(*, client_certificates: bool) -> AsyncIterator[tuple[str, dict[str, Channel]]]:
    """A server of all services, and a channel of each caller."""
    ca, other = make_ca(CLUSTER), make_ca(CLUSTER)
    both = ca.certificate + other.certificate  # as far as it is concerned: what is tested is whom the server believes
    async with AsyncExitStack() as stack:
        server = await transport(ca, GATEWAY, PREFILL, DECODE).listen(
            "127.0.0.1:0",
            {service: answering(service) for service in SERVICES},
            client_certificates=client_certificates,
        )
        stack.push_async_callback(server.stop)
        callers = {role: transport(ca, role) for role in ALL_ROLES}
        callers[OTHER_CA] = transport(other, *ALL_ROLES, trusts=both)
        callers[OTHER_CLUSTER] = transport(ca, *ALL_ROLES, cluster="another")
        callers[NOBODY] = Transport(believing(ca.certificate, None))
        address, channels = f"127.0.0.1:{server.port}", dict[str, Channel]()
        for name, each in callers.items():
            channels[name] = each.dial(address)  # known by its host: other clusters know it by no other name
            stack.push_async_callback(each.close)
        yield address, channels


def test_every_method_has_its_row_and_every_row_a_method() -> None:
    known = {method for method, _, _ in methods()}
    assert known <= set(CALLERS)
    ours = {method for method in CALLERS if method.startswith(("/isthmus.", "/vllm."))}
    assert ours <= known


@pytest.mark.parametrize("client_certificates", [True, False], ids=["certificates asked for", "a port for clients"])
async def test_exactly_the_allowed_succeed(client_certificates: bool) -> None:
    async with port(client_certificates=client_certificates) as (_, channels):
        assert set(channels) == EVERYBODY
        wrong = dict[str, str]()
        for method, streams, request in methods():
            service = method.split("/")[1]
            # A port that asks for no certificate sees none: all are clients there.
            may = MAY[service] if client_certificates else EVERYBODY if service in PUBLIC else set[str]()
            calls = {who: outcome(channel, method, streams, request) for who, channel in channels.items()}
            codes = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
            refused = grpc.StatusCode.PERMISSION_DENIED
            outside = {NOBODY, OTHER_CA} if client_certificates else set[str]()  # no handshake, no call
            for who, code in codes.items():
                expected = (
                    grpc.StatusCode.OK if who in may else grpc.StatusCode.UNAVAILABLE if who in outside else refused
                )
                if code is not expected:
                    wrong[f"{method} by {who}"] = f"{code.name}, not {expected.name}"
        assert wrong == {}


async def test_a_method_without_a_row_is_refused_to_everybody() -> None:
    ca = make_ca(CLUSTER)
    server = await Transport(security(ca, GATEWAY)).listen("127.0.0.1:0", {})
    await server.stop()
    service = SERVICES[0]
    unknown = {"Unknown": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
    server = await Transport(security(ca, GATEWAY)).listen(
        "127.0.0.1:0", {service: lambda server: server.add_registered_method_handlers("isthmus.v1.Unknown", unknown)}
    )
    caller = transport(ca, *ALL_ROLES)
    try:
        channel = caller.dial(f"127.0.0.1:{server.port}")
        assert await outcome(channel, "/isthmus.v1.Unknown/Unknown", False, b"") is grpc.StatusCode.PERMISSION_DENIED
    finally:
        await caller.close()
        await server.stop()

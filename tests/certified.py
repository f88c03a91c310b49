"""Certificates for tests: CAs, and `Security` of somebody, from memory or from files that are replaced."""

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from smg_grpc_proto import vllm_engine_pb2
from support.certificates import CLUSTER, certificate

from isthmus.proto import decode_pb2, generation_pb2, jobs_pb2, prefill_pb2, supervisor_pb2, worker_pb2
from isthmus.proto.rpc.channel import Channel
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import KeyPair
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import Identity, Role
from isthmus.proto.security.sources import Known, Material, Memory

FILES = (decode_pb2, generation_pb2, jobs_pb2, prefill_pb2, supervisor_pb2, vllm_engine_pb2, worker_pb2)
SERVICES: list[ServiceDescriptor] = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]


def security(ca: KeyPair, *roles: Role, cluster: str = CLUSTER, trusts: bytes | None = None) -> Security:
    """What such a process uses."""
    return Security(Memory(Material(trusts or ca.certificate, certificate(ca, *roles, cluster=cluster))))


def transport(ca: KeyPair, *roles: Role, cluster: str = CLUSTER, trusts: bytes | None = None) -> Transport:
    """What such a process dials and listens with."""
    return Transport(security(ca, *roles, cluster=cluster, trusts=trusts))


def believing(ca: bytes, pair: KeyPair | None, *roles: Role, cluster: str = CLUSTER) -> Security:
    """Of a process that looks at nothing it was given: expired certificates and the like."""
    identities = tuple(Identity(cluster, role, f"some-{role}") for role in roles)
    return Security(Memory(Material(ca, pair), Known(identities)))


def methods() -> list[tuple[str, bool, bytes]]:
    """Every method that a server of ours has, whether it streams its answer, and a request."""
    found = [
        (f"/{service.full_name}/{method.name}", method.server_streaming, _empty(method))
        for service in SERVICES
        for method in service.methods
    ]
    health = [("/grpc.health.v1.Health/Check", False, b""), ("/grpc.health.v1.Health/Watch", True, b"")]
    reflection = ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True, b"")
    return [*found, *health, reflection]


def _empty(method: MethodDescriptor) -> bytes:
    return GetMessageClass(method.input_type)().SerializeToString()


async def outcome(channel: Channel, method: str, streams: bool, request: bytes) -> grpc.StatusCode:
    """The status of a call; OK for a stream that has begun."""
    try:
        if streams:
            call = channel.unary_stream(method)(request, timeout=10)
            read = await call.read()
            call.cancel()
            return grpc.StatusCode.OK if read is not grpc.aio.EOF else await call.code()
        await channel.unary_unary(method)(request, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK

"""How benchmarks and tests reach processes that they started: encrypted, with the certificates of this user's local
cluster, as `isthmus` itself; in plain text where ISTHMUS_TLS=off, which those processes inherit."""

import grpc

from isthmus.cluster.client.security import is_off
from isthmus.proto.rpc.channel import Channel
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import Role, ServerName
from isthmus.proto.security.settings import security_of


def transport_as(*roles: Role) -> Transport:
    """One of a process of these roles."""
    return Transport(local_security(*roles))


def local_security(*roles: Role) -> Security | None:
    """The certificates of such a process; None: plain text."""
    return security_of("off" if is_off() else "auto", None, *roles)


def to_gateway(address: str) -> Channel:
    """A channel to a gateway, as a client and admin."""
    return transport_as("client").dial(address, "gateway")


def to_worker(address: str, role: ServerName = "worker") -> Channel:
    """A channel to a worker, as the gateway; `role`: what it must be."""
    return transport_as("gateway").dial(address, role)


def blocking_channel(address: str) -> grpc.Channel:
    """As `to_gateway`, for code that is not asynchronous."""
    security = local_security("client")
    if security is None:
        return grpc.insecure_channel(address)
    _, credentials = security.channel_credentials()
    name = security.expected_name("gateway")
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", name)])

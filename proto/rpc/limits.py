"""What a server takes of its peers at most: without these, memory grows with what anybody sends or leaves open.

Bytes of messages that are under way are at most MAX_CALLS times the limit of a message.
"""

import resource
from typing import Any

MAX_CONNECTIONS = 4_096  # to one port
MAX_STREAMS = 1_024  # calls at once on one connection; a client of gRPC waits with more
MAX_CALLS = 8_192  # at once, over all connections; more are answered RESOURCE_EXHAUSTED
MAX_METADATA_BYTES = 16 << 10
HANDSHAKE_S = 10  # from the connection to the end of its handshake and the client's SETTINGS
REQUEST_S = 30.0  # from the headers of a call to the end of its first message
IDLE_S = 600  # without a call; clients of gRPC connect again by themselves

# A message of a few kB can say that it is gigabytes: messages are not compressed here in either direction.
UNCOMPRESSED: dict[str, Any] = {
    "grpc.compression_enabled_algorithms_bitset": 1,  # identity; others are answered UNIMPLEMENTED
    "grpc.per_message_decompression": 0,
}
SERVER_LIMITS: dict[str, Any] = {
    "grpc.max_concurrent_streams": MAX_STREAMS,
    # Calls that Python has not looked at yet. With more than the first gRPC cancels some at random.
    "grpc.server.max_pending_requests": MAX_CALLS,
    "grpc.server.max_pending_requests_hard_limit": 2 * MAX_CALLS,
    "grpc.max_metadata_size": MAX_METADATA_BYTES,  # gRPC would refuse some between this and the next
    "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
    "grpc.server_handshake_timeout_ms": HANDSHAKE_S * 1000,
    "grpc.http2.settings_timeout": HANDSHAKE_S * 1000,  # until the client confirms ours: no limit binds it before
    "grpc.max_connection_idle_ms": IDLE_S * 1000,
}


def connection_limit() -> int:
    """How many connections a port may have: MAX_CONNECTIONS, or half of the descriptors that this process may open.

    Raises the process's soft limit of descriptors to its hard one, as servers do: the soft one is often 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, hard // 2)

"""What a client shows a gateway: an API key or a token, as metadata of every call."""

import string
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio

from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import parse_address
from ...proto.rpc.transport import Transport
from .security import server_role

_ALLOWED = frozenset(string.ascii_letters + string.digits + "-._~+/=")  # of a bearer token (RFC 6750)


class ApiKey:
    """An API key or a JSON Web Token. No text that is made of it shows it."""

    def __init__(self, text: str, *, over_plaintext: bool = False) -> None:
        """`over_plaintext`: it may be sent to other hosts in plain text. InvalidRequest for what can be no key."""
        if not text or not _ALLOWED.issuperset(text):
            raise InvalidRequest("an API key has letters, digits and -._~+/= only; this one is empty or has others")
        self.metadata = (("authorization", f"Bearer {text}"),)
        self._over_plaintext = over_plaintext

    def __repr__(self) -> str:
        return "ApiKey(...)"

    def check(self, address: str, transport: Transport) -> None:
        """InvalidRequest where anybody on the way to `address` could read it."""
        if transport.encrypted or self._over_plaintext or parse_address(address, to_dial=True).is_loopback:
            return
        raise InvalidRequest(
            f"an API key would go to {address} in plain text, for anybody on the way to read: use TLS, or allow it "
            "with --plaintext-key"
        )


def as_api_key(key: ApiKey | str | None) -> ApiKey | None:
    """A key as programs give it."""
    return ApiKey(key) if isinstance(key, str) else key


class AuthorizedChannel(grpc.aio.Channel):
    """A channel whose every call shows the key."""

    def __init__(self, inner: grpc.aio.Channel, key: ApiKey) -> None:
        self._inner, self._metadata = inner, key.metadata

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._showing(self._inner.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._showing(self._inner.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._showing(self._inner.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._showing(self._inner.stream_stream(*args, **options))

    def _showing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(request: Any = None, *, metadata: Any = None, **rest: Any) -> Any:
            return call(request, metadata=(*(metadata or ()), *self._metadata), **rest)

        return calling


def dial(address: str, transport: Transport, key: ApiKey | None) -> grpc.aio.Channel:
    """A channel to a gateway's client port; with a key one whose calls show it. InvalidRequest as `ApiKey.check`."""
    if key is not None:
        key.check(address, transport)
    channel = transport.dial(address, server_role(address))
    return channel if key is None else AuthorizedChannel(channel, key)

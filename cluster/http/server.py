"""The HTTP port of a gateway: uvicorn in the gateway's own event loop, started and ended as a gRPC server is.

server = await HttpServer.listen("127.0.0.1:8000", app, None)
server.address
await server.stop(grace_s)
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ...proto.rpc.addresses import HostPort, parse_address
from ...proto.rpc.limits import HANDSHAKE_S, IDLE_S, MAX_METADATA_BYTES
from ...proto.security.credentials import Security
from .connection import Connection
from .tls import context_of

log = logging.getLogger(__name__)

_BACKLOG = 2048
_STOP_LIMIT_S = 5.0


class _Uvicorn(uvicorn.Server):
    """Leaves signals and the end of the process to the gateway."""

    tls: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        assert sockets is not None
        make = partial(Connection, config=self.config, server_state=self.server_state, app_state={})
        handshake_s = None if self.tls is None else float(HANDSHAKE_S)
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(make, sock=each, ssl=self.tls, backlog=_BACKLOG, ssl_handshake_timeout=handshake_s)
            for each in sockets
        ]
        self.started = True


class HttpServer:
    """A port that is open, and what answers there."""

    def __init__(self, server: _Uvicorn, listening: socket.socket, address: HostPort, *, encrypted: bool) -> None:
        self._server, self._address, self.encrypted = server, address, encrypted
        self._serving = asyncio.create_task(server.serve(sockets=[listening]), name="http")

    @classmethod
    async def listen(cls, listen: str, app: ASGIApp, security: Security | None) -> "HttpServer":
        """Starts to serve an ASGI application at host:port (port 0 picks one); OSError where it cannot be bound."""
        at = parse_address(listen)
        tls = await asyncio.to_thread(context_of, security) if security is not None else None
        listening = await asyncio.to_thread(_bind, at)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,  # what is wrong with a request is told by `guard.py`
            access_log=False,
            proxy_headers=False,  # anybody could claim any address
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=MAX_METADATA_BYTES,
            reset_contextvars=True,
        )
        server = _Uvicorn(config)
        server.tls = tls
        address = at._replace(port=listening.getsockname()[1])
        made = cls(server, listening, address, encrypted=security is not None)
        while not server.started:
            if made._serving.done():
                made._serving.result()
            await asyncio.sleep(0)
        return made

    @property
    def address(self) -> HostPort:
        """host:port, with the port that was bound."""
        return self._address

    @property
    def url(self) -> str:
        """Its address as clients name it."""
        return f"{'https' if self.encrypted else 'http'}://{self._address}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Closes the port, and after `grace_s` ends the requests that still run, each with a word to its client."""
        state = self._server.server_state
        for server in getattr(self._server, "servers", []):
            server.close()
        running = set(state.tasks)
        if running and grace_s:
            await asyncio.wait(running, timeout=grace_s)
        for task in state.tasks:
            task.cancel()
        if state.tasks:
            await asyncio.wait(set(state.tasks), timeout=_STOP_LIMIT_S)
        self._server.should_exit = True
        connections: set[Any] = state.connections
        for connection in set(connections):
            connection.transport.close()
        done, _ = await asyncio.wait([self._serving], timeout=_STOP_LIMIT_S)
        if not done:
            log.warning("the HTTP server on port %d did not end within %.0f s", self._address.port, _STOP_LIMIT_S)
            self._serving.cancel()
        for connection in set(connections):  # what waits there is read by nobody
            connection.abort()


def _bind(at: HostPort) -> socket.socket:
    """A socket that is bound and does not share its port; OSError. May take as long as a name server."""
    host = "::" if at.is_any and socket.has_dualstack_ipv6() else at.host
    found = socket.getaddrinfo(host, at.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if at.is_any else 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {at}: {error.strerror}") from None
    return bound

"""One connection to the HTTP port: uvicorn's, with bounds on clients that are slow, silent or too many."""

import asyncio
import contextlib
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...proto.rpc.limits import MAX_METADATA_BYTES, connection_limit
from ...proto.rpc.streams import STALL_S

HEADERS_S = 30.0  # from a connection, or the first byte of its next request, to the end of the request's headers
_BUSY = json.dumps(
    {
        "error": {
            "message": "too many connections; try again later",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }
)
_REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    f"content-length: {len(_BUSY)}\r\n\r\n{_BUSY}"
).encode()


class Connection(H11Protocol):
    """Handlers find it as `scope["state"]["connection"]`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, "connection": self}
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        too_many = len(self.connections) >= connection_limit()
        super().connection_made(transport)
        if too_many:
            transport.write(_REFUSAL)
            transport.close()
            return
        _end_when_unread(transport.get_extra_info("socket"))
        self._bound_headers()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._bound_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the beginning of another request, which came before this answer's end
            self._bound_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_due()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered as other mistakes are; h11 has given up on the connection."""
        msg = f"{msg} Allowed: HTTP/1.1 with one host, and headers of at most {MAX_METADATA_BYTES} bytes"
        body = json.dumps(
            {"error": {"message": msg, "type": "invalid_request_error", "param": None, "code": "not_http"}}
        ).encode()
        with contextlib.suppress(h11.LocalProtocolError):  # an answer is on its way already
            headers = [("content-type", "application/json"), ("connection", "close")]
            headers.append(("content-length", str(len(body))))
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def abort(self) -> None:
        """Ends the connection without what still waits to be sent: its client does not read it."""
        self.transport.abort()

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The client's, as `ssl.SSLSocket.getpeercert` has it; None where it has shown none."""
        tls = self.transport.get_extra_info("ssl_object")
        return (tls.getpeercert() or None) if tls is not None else None

    def _bound_headers(self) -> None:
        """A client may be silent between two requests (`timeout_keep_alive`), but not within its headers."""
        if self.conn.their_state is not h11.IDLE:
            self._forget_due()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADERS_S, self.abort)

    def _forget_due(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


def _end_when_unread(connected: socket.socket) -> None:
    """Has the kernel end a connection whose peer takes nothing of what waits for it, or is not there any more."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_S * 1000))

"""A server of grpc.aio that no path of a call harms.

grpc.aio (grpcio 1.85.1) reads the path of a call for which no method is registered as UTF-8, in the loop by which it
takes all calls. Where it is none the loop ends: it cancels its requests for further calls, into whose freed memory the
C core still writes, and the port takes no more calls. One packet of anybody who may connect would do.

Calls of registered methods come by requests of their own, and all of ours are registered. So whatever else comes is of
no method, and is answered here, past that loop and without a look at its path.
"""

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

import grpc.aio

cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")
UNKNOWN = "/"  # the path that interceptors see of a call of no method


class _Server(cygrpc.AioServer):
    """Takes calls of registered methods; all others it answers UNIMPLEMENTED, or as an interceptor says."""

    interceptors: tuple[grpc.aio.ServerInterceptor, ...] = ()

    async def _request_call(self) -> Any:
        """A call for which no method is registered, of which none comes back from here; raises once the server ends."""
        loop, answers = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        nothing = cygrpc._MethodResolver([], {})
        while True:
            state = await super()._request_call()
            answer = cygrpc._handle_rpc(UNKNOWN, nothing, self.interceptors, state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, state, loop, UNKNOWN))
            answers.add(task)
            task.add_done_callback(answers.discard)


def aio_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    options: Sequence[tuple[str, Any]] = (),
    maximum_concurrent_rpcs: int | None = None,
) -> grpc.aio.Server:
    """As `grpc.aio.server`; its methods must be registered (`add_registered_method_handlers`, as stubs do)."""
    plain, cygrpc.AioServer = cygrpc.AioServer, _Server  # there is no other way to have it make one of another class
    try:
        made = grpc.aio.server(
            interceptors=interceptors, options=options, maximum_concurrent_rpcs=maximum_concurrent_rpcs
        )
    finally:
        cygrpc.AioServer = plain
    made._server.interceptors = tuple(interceptors)  # pyright: ignore[reportAttributeAccessIssue]
    return made

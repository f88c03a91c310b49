"""The application behind the HTTP port: the endpoints of all families of the API, and what stands before them."""

from collections.abc import Awaitable, Callable, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...proto.errors import IsthmusError
from .call import Call
from .door import Door, Endpoint
from .errors import OPENAI, on_error, on_routing
from .guard import Entrance, Guard
from .openapi import document


def build_app(door: Door, endpoints: Iterable[Endpoint], *, cluster: str = "") -> ASGIApp:
    """The application of a door with these endpoints. `cluster`: that of the gateway's certificate."""
    endpoints = list(endpoints)
    endpoints.append(_openapi(endpoints))
    routed = Starlette(
        routes=routes(door, endpoints),
        exception_handlers={HTTPException: on_routing, IsthmusError: on_error, Exception: on_error},
    )
    routed.router.redirect_slashes = False
    open_paths = frozenset(each.path for each in endpoints if each.open)
    app: ASGIApp = Entrance(routed, door, open_paths, cluster)
    if origins := door.config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # clients send headers of their own; none of them is a credential of the browser
            expose_headers=("*",),
        )
    dialects = {each.path: each.dialect for each in endpoints if each.dialect is not OPENAI}
    return Guard(app, quiet=open_paths, dialects=dialects)


def routes(door: Door, endpoints: Iterable[Endpoint]) -> list[Route]:
    """What Starlette finds handlers by."""
    return [Route(each.path, _handler(door, each), methods=[each.method]) for each in endpoints]


def _handler(door: Door, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await endpoint.handle(Call(door, request))

    return handle


def _openapi(endpoints: list[Endpoint]) -> Endpoint:
    """The document of the API, made once."""
    made: dict[str, object] = {}

    async def handle(call: Call) -> Response:
        if not made:
            made.update(document(endpoints))
        return JSONResponse(made)

    return Endpoint(method="GET", path="/openapi.json", summary="This document.", handle=handle)
